"""What chat completions and completions share: one streamed request, its checks, and a first look at the server."""

from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from uld_adapters.backend import ServerSampling
from uld_adapters.errors import (
    ContinuationUnavailable,
    MalformedAnswer,
    ModelNotFound,
    RequestRejected,
    StreamInterrupted,
    TokenizerMismatch,
    UsageError,
)
from uld_adapters.logprobs import Draft, FinishReason, TopLogprobs
from uld_adapters.openai.names import Told
from uld_adapters.openai.transcript import UNTOLD, Transcript
from uld_adapters.served import GREEDY
from uld_adapters.served_text import TextServedBackend
from uld_adapters.vocabulary.by_bytes import TokensByBytes
from uld_adapters.vocabulary.fingerprint import CORPUS
from uld_adapters.vocabulary.tokens import Vocabulary

LOOKAHEAD = 3  # tokens that may follow half a character before it is whole
DRAWS = 16  # of a first token at random, of which many may end the answer
SAME = 0.2  # nats between two readings of one position, on servers that are not reproducible to the last bit
COMPARED = " ".join(CORPUS[:4]).strip()


class OpenAIServer(TextServedBackend):
    """A server of the OpenAI kind. Tokens come as bytes or strings; ids are found in the vocabulary of `tokenizer`.

    `base_url` is what the official client takes: a path in it stands for all of /v1.
    """

    name = "openai"
    logprobs_hint = "choose a model with log-probabilities: models that reason out of sight have none"
    _route = ""
    _length_field = "max_tokens"
    _lookahead = 0
    _tells_end = False  # whether it has ever reported the token that ends an answer

    def __init__(self, *, base_url: str | None = None, **options: Any) -> None:
        super().__init__(base_url=base_url, **options)
        path = urlsplit(base_url or "").path.rstrip("/")
        self._path = ("" if path and not path.endswith("/v1") else "/v1") + self._route
        self._context: int | None = None

    @cached_property
    def _tokens(self) -> TokensByBytes:
        return TokensByBytes(Vocabulary.from_hf(self.tokenizer))

    @abstractmethod
    def _begun(self, prefix: Sequence[int]) -> tuple[int, dict[str, Any]]:
        """How many ids of the prefix go out, and the fields of the request that say them."""

    @abstractmethod
    def _asked(self) -> dict[str, Any]:
        """The fields of the request that ask for log-probabilities."""

    def _opened(self, begun: dict[str, Any]) -> Any:
        """What `_told` keeps of one answer's events."""
        return None

    @abstractmethod
    def _told(self, choice: dict[str, Any], opened: Any) -> tuple[list[Told], str]:
        """Positions and text of one event."""

    def _learn(self, begun: dict[str, Any], opened: Any) -> None:
        """Take note of the server's ways after an answer that arrived whole."""

    def _body(self, begun: dict[str, Any], n: int, sampling: ServerSampling) -> dict[str, Any]:
        return {
            "model": self.model,
            **begun,
            **self._asked(),
            self._length_field: n,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """One streamed request; the server's own count shows at its end whether an event was lost or came twice."""
        start, begun = self._begun(prefix)
        again = list(prefix[start:])
        if again and not sampling.greedy:
            raise ContinuationUnavailable(f"a sampled answer broke off, and {self.name} cannot go on where it ended", hint="ask again")
        wanted, ahead = n + len(again), self._lookahead
        room = wanted + ahead if self._context is None else min(wanted + ahead, self._context - start)
        body = self._body(begun, max(room, wanted), sampling) | {"stream": True, "stream_options": {"include_usage": True}}
        transcript = Transcript(self._tokens, self.top_logprobs)
        tokens: list[int] = []
        last: Draft | None = None
        opened = self._opened(begun)
        reason = usage = None
        async with aclosing(self.http.events(self._path, body)) as events:
            async for event in events:
                if event.get("error"):
                    raise StreamInterrupted(f"{self.name} broke off: {event['error']}")
                usage = event.get("usage") or usage
                choice = (event.get("choices") or [{}])[0]
                reason = choice.get("finish_reason") or reason
                for token, top in transcript.push(*self._told(choice, opened)):
                    position = self.read_position(token, top, sampling, wanted=1)
                    tokens.append(token)
                    if len(tokens) <= len(again):
                        self.check_repeated(token, again[len(tokens) - 1])
                    elif len(tokens) < wanted:
                        yield Draft((token,), (position,))
                    else:
                        last = last or Draft((token,), (position,))
                if last is not None and ahead:
                    break
            else:
                self._check_end(reason)
                if transcript.close():
                    self._lookahead = LOOKAHEAD  # for the next try
                    raise MalformedAnswer(f"{self.name} tells tokens by U+FFFD alone, and no text completes them", hint=UNTOLD)
                self._check_count(usage, tokens, reason, handed_out=len(tokens) - (last is not None) > len(again))
                self._learn(begun, opened)
        if last is not None:
            yield last
        yield self._end(reason, tokens, full=last is not None, usage=usage if start == 0 else None)

    def _check_end(self, reason: str | None) -> None:
        if reason is None:
            raise StreamInterrupted(f"{self.name}'s answer ended before its last event")
        if reason not in ("stop", "length"):
            raise RequestRejected(f"{self.name} ended the answer itself ({reason})", hint="see the server's own rules about such answers")

    def _end(self, reason: str | None, tokens: list[int], *, full: bool, usage: dict[str, Any] | None) -> Draft:
        """The last piece: an end that is not reported comes as an end token without a report."""
        counted = None if usage is None else usage.get("prompt_tokens")
        if reason == "stop" and self._is_end(tokens):
            self.end_ids, self._tells_end = self.end_ids | {tokens[-1]}, True
            return Draft((), (), FinishReason.STOP, counted)
        if full or reason != "stop":
            return Draft((), (), FinishReason.LENGTH, counted)
        if self._tells_end:
            raise MalformedAnswer(f"{self.name} ended the answer without reporting the end token, as it did before")
        return Draft((self._end_token(),), (TopLogprobs.unreported(),), FinishReason.STOP, counted)

    def _is_end(self, tokens: list[int]) -> bool:
        """Whether the last token is one that ends an answer, reported like any other."""
        return bool(tokens) and (tokens[-1] in self._tokens.vocabulary.control or tokens[-1] in self.end_ids)

    def _end_token(self) -> int:
        named = self.tokenizer.eos_token_id
        if named is None and not self.end_ids:
            raise TokenizerMismatch(
                f"{self.name} ends its answers without a word, and its tokenizer {self._tokens.vocabulary.name} names no end-of-turn token",
                hint="pass tokenizer=... of the served model, with its end token",
            )
        return int(min(self.end_ids) if named is None else named)

    def _check_count(self, usage: dict[str, Any] | None, tokens: list[int], reason: str | None, *, handed_out: bool) -> None:
        """Compare the server's count with what arrived; an end that is not reported may count. What is handed out cannot be mended."""
        counted = (usage or {}).get("completion_tokens")
        hidden = ((usage or {}).get("completion_tokens_details") or {}).get("reasoning_tokens")
        if hidden:
            raise RequestRejected(f"{self.name} reasoned out of sight, in {hidden} tokens that nobody verified", hint=self.logprobs_hint)
        written = len(tokens)
        unreported_end = reason == "stop" and not self._is_end(tokens)
        if counted is not None and counted not in (written, written + unreported_end):
            error = MalformedAnswer(
                f"{self.name} wrote {counted} tokens, {written} arrived", hint="see what stands between, a proxy perhaps"
            )
            error.retryable = not handed_out
            raise error

    async def _named(self) -> None:
        """Find out the model's name where none was given, and its context where the server tells it."""
        try:
            listing = await self.http.request("GET", self._path.removesuffix(self._route) + "/models")
            entries = {str(entry["id"]): entry for entry in listing["data"]}
        except (ModelNotFound, RequestRejected):
            if self.model is None:
                raise
            return
        except (KeyError, TypeError) as error:
            raise MalformedAnswer(f"the server's list of models lacks a field: {error!r}") from error
        if self.model is None:
            if len(entries) != 1:
                some = ", ".join(list(entries)[:8]) + (", ..." if len(entries) > 8 else "")
                raise UsageError(f"{self.http.base_url} serves {len(entries)} models", hint=f"name one: model=... (--model), of {some}")
            self.model = next(iter(entries))
        context = entries.get(self.model, {}).get("max_model_len")
        self._context = context if isinstance(context, int) else None

    async def _once(self, begun: dict[str, Any], *, temperature: float = 0.0) -> tuple[TopLogprobs, int | None]:
        """One token: the report of its position, and how many tokens the server counts in the prompt.

        Lowers k to the server's cap, and says the length in the field that the server knows. A token that is drawn at random may end
        the answer, of which a server need not report anything; then another is drawn.
        """
        draws = DRAWS if temperature else 1
        while True:
            try:
                answer = await self.http.request("POST", self._path, self._body(begun, 1, ServerSampling(temperature)))
            except RequestRejected as error:
                if "max_completion_tokens" in error.message and self._length_field == "max_tokens":
                    self._length_field = "max_completion_tokens"
                elif self._lower_top(error) is None:
                    raise
                continue
            try:
                opened = self._opened(begun)
                told, text = self._told(choice := answer["choices"][0], opened)
                self._learn(begun, opened)
                counted = (answer.get("usage") or {}).get("prompt_tokens")
            except (KeyError, TypeError, IndexError) as error:
                raise MalformedAnswer(f"the answer to a first request lacks a field: {error!r}") from error
            draws -= 1
            if told or text or choice.get("finish_reason") != "stop" or not draws:
                break
        top = Transcript(self._tokens, self.top_logprobs).rivals(told[0]) if told else TopLogprobs.unreported()
        self.check_report(top, 1)
        return top, counted

    def _compared(self, counted: int | None, expected: int, *, tolerance: int = 0) -> str:
        """A note on the tokenizer, after comparing the server's count of a text's tokens with the tokenizer's."""
        if counted is None:
            return "the server does not count its tokens: the tokenizer was not compared with its own"
        if abs(counted - expected) > tolerance:
            raise TokenizerMismatch(
                f"the server at {self.http.base_url} splits a text into {counted} tokens,"
                f" the tokenizer {self._tokens.vocabulary.name} into {expected}"
                f" ({COMPARED[:40]!r}...)",
                hint="pass tokenizer=... of the served model; the assistant's may be another",
            )
        return "the server does not tell how it splits a text: only the number of tokens was compared with the tokenizer's"

    async def _tokenize(self, text: str) -> list[int] | None:
        return None


def alike(one: TopLogprobs, other: TopLogprobs) -> bool:
    """Whether two reports can be of one position: most tokens in common, with nearly the same values."""
    common = set(one.ids.tolist()) & set(other.ids.tolist())
    if not common or 2 * len(common) < min(one.ids.size, other.ids.size):
        return False
    return all(abs((one.of(token) or 0.0) - (other.of(token) or 0.0)) <= SAME for token in common)
