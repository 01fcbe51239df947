"""An echo: the tokens of a prompt as the server tells them, which scores a given text in one request."""

from collections.abc import Sequence
from typing import Any

from uld_adapters.errors import MalformedAnswer, TokenizerMismatch
from uld_adapters.logprobs import TopLogprobs
from uld_adapters.openai.names import Named, completion_positions, of_string
from uld_adapters.openai.transcript import Transcript, is_broken
from uld_adapters.vocabulary.by_bytes import TokensByBytes


def read_echo(report: Any, ids: Sequence[int], tokens: TokensByBytes, *, wanted: int, added: bool) -> list[TopLogprobs | None]:
    """K at the position of each of the ids, the token itself among it; None where the server tells nothing, as of the first.

    `wanted` is k, and `added` says that the server itself puts the first id in front, and may leave it out of its echo. One written
    token may follow. Raises `TokenizerMismatch` unless the names are those of the ids, one by one, and `MalformedAnswer`.
    """
    try:
        first = of_string(str(report["tokens"][0]), 0.0)
        told, _, _ = completion_positions({name: values[1:] for name, values in report.items() if isinstance(values, list)})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise MalformedAnswer(f"the server's echo lacks a field: {error!r}") from error
    names = [first, *(position.token for position in told)]
    forms = [list(ids), list(ids[1:])] if added else [list(ids)]
    shown = [form for form in forms if len(names) - len(form) in (0, 1) and all(map(_Names(tokens).fit, names, form))]
    if len(shown) != 1:
        raise TokenizerMismatch(
            f"the server echoes other tokens than the {len(ids)} that it was sent", hint="pass tokenizer=... of the served model"
        )
    transcript, half = Transcript(tokens, wanted), b""
    positions: list[TopLogprobs | None] = [None] * (len(ids) - len(shown[0]) + 1)
    for entry, token in zip(told, shown[0][1:], strict=False):
        positions.append(transcript.report(entry, token, half))
        untold = entry.token.id is None and entry.token.data is None
        half = half + tokens.spelling(token) if untold else b""
    return positions


class _Names:
    """What a token may be called: half a character by nothing, or by the whole one that it completes."""

    def __init__(self, tokens: TokensByBytes) -> None:
        self._rows = tokens.vocabulary.tokens

    def fit(self, named: Named, token: int) -> bool:
        """Whether a name can be that of a token."""
        if named.id is not None or not 0 <= token < len(self._rows):
            return named.id == token
        data = self._rows[token]
        return named.data == data or (is_broken(data) and (named.data is None or named.data.endswith(data)))
