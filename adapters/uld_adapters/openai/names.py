"""How servers of the OpenAI kind name tokens: by bytes, by strings, and here and there by ids."""

import re
from dataclasses import dataclass
from typing import Any

from uld_adapters.errors import LogprobsUnavailable, MalformedAnswer
from uld_adapters.logprobs import MASKED

_ID = re.compile(r"token_id:(\d+)\Z")  # vLLM's --return-tokens-as-token-ids
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Named:
    """A token as it is told, with log p in nats (None: masked, or too unlikely to be told).

    Its id where the server says it, else its bytes; half a character without its bytes has neither.
    """

    logprob: float | None
    data: bytes | None = None
    id: int | None = None


@dataclass(frozen=True)
class Told:
    """One position: the written token, and the most probable ones."""

    token: Named
    top: tuple[Named, ...]


def _value(logprob: Any) -> float | None:
    return None if float(logprob) <= MASKED else float(logprob)


def looks_like_control(name: bytes) -> bool:
    """Whether a name is written as control tokens are, such as <|im_end|> or </s>."""
    return name.startswith(b"<") and name.endswith(b">")


def of_string(text: str, logprob: Any) -> Named:
    """A token by its string; the API's own completions write broken characters as `bytes:` and escapes."""
    if match := _ID.match(text):
        return Named(_value(logprob), id=int(match.group(1)))
    if text.startswith("bytes:"):
        data = _ESCAPE.sub(lambda found: bytes([int(found.group(1), 16)]), text.removeprefix("bytes:").encode())
        return Named(_value(logprob), data)
    return Named(_value(logprob), None if not text or _BROKEN in text else text.encode())


def of_entry(entry: dict[str, Any]) -> Named:
    """A token by an entry of chat completions; bytes that spell U+FFFD tell no more than the string does."""
    plain = of_string(str(entry["token"]), entry["logprob"])
    if plain.id is not None:
        return plain
    data = None if entry.get("bytes") is None else bytes(entry["bytes"])
    if data is not None:
        plain = Named(plain.logprob, None if not data or _BROKEN.encode() in data else data)
    return plain if entry.get("id") is None else Named(plain.logprob, plain.data, int(entry["id"]))


def chat_positions(report: Any) -> list[Told]:
    """The positions of chat completions' `logprobs`; raises MalformedAnswer where a field is missing."""
    try:
        return [Told(of_entry(entry), tuple(of_entry(other) for other in entry["top_logprobs"])) for entry in report["content"] or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedAnswer(f"the server's log-probabilities lack a field: {error!r}") from error


def completion_positions(report: Any) -> tuple[list[Told], list[str], list[int]]:
    """The positions of completions' `logprobs`, each written token's string, and its place (-1: not told); checked for their shape."""
    try:
        names, values, tops = report["tokens"], report["token_logprobs"], report["top_logprobs"]
        places = report.get("text_offset") or [-1] * len(names)
        if tops is None or any(top is None for top in tops):
            raise LogprobsUnavailable("the server named tokens without their rivals", hint="ask it for logprobs of at least 1")
        if not len(names) == len(values) == len(tops) == len(places):
            raise MalformedAnswer("the server's lists of log-probabilities do not belong together")
        told = [
            Told(of_string(name, value), tuple(of_string(other, logprob) for other, logprob in top.items()))
            for name, value, top in zip(names, values, tops, strict=True)
        ]
        return told, [str(name) for name in names], [int(place) for place in places]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswer(f"the server's log-probabilities lack a field: {error!r}") from error
