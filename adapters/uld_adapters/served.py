"""What every backend behind HTTP shares: its tokenizer, whole drafts out of streams, scoring by drafts."""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.dialects import wrong_backend
from uld_adapters.errors import (
    BackendError,
    LogprobsUnavailable,
    MalformedAnswer,
    RequestRejected,
    TokenizerMismatch,
    UldError,
    UsageError,
)
from uld_adapters.http import HttpClient
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs
from uld_adapters.vocabulary.fingerprint import CORPUS
from uld_adapters.vocabulary.opening import open_tokenizer
from uld_adapters.vocabulary.tokens import end_token_ids, name_of

GREEDY = ServerSampling()
DEFAULT_TOP = 20
GREEDY_TOLERANCE = 1e-3  # nats; two tokens this close may change places between a server's sampler and its report
MASS_TOLERANCE = 0.01  # nats that a report may sum to above log 1, by rounding


class CapabilityWarning(UserWarning):
    """The server gives less than was asked for."""


class ServedBackend(ABC):
    """Base of the backends that speak HTTP; a subclass gives `stream`, `_tokenize` and `_inspect`."""

    name = "served"

    def __init__(
        self,
        *,
        base_url: str | None = None,
        model: str | None = None,
        tokenizer: Any = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        http_client: Any = None,
        top_logprobs: int | None = None,
    ) -> None:
        if top_logprobs is not None and top_logprobs < 1:
            raise UsageError(f"top_logprobs is {top_logprobs}", hint="ask for at least 1; 20 is usual")
        self.http = HttpClient(base_url, api_key=api_key, timeout=timeout, max_retries=max_retries, http_client=http_client)
        self.model = model
        self.top_logprobs = top_logprobs or DEFAULT_TOP
        self._asked_for_top = top_logprobs is not None
        self._source = tokenizer
        self._tokenizer: Any = None
        self._capabilities: Capabilities | None = None

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer, loaded when first used."""
        if self._tokenizer is None:
            if self._source is None:
                raise UsageError(
                    f"the {self.name} backend has no tokenizer", hint="pass tokenizer=... (a folder, GGUF or tiktoken file, or hub name)"
                )
            self._tokenizer = open_tokenizer(self._source)
            self.end_ids = end_token_ids(self._tokenizer)
        return self._tokenizer

    async def probe(self) -> Capabilities:
        """Find out what the server can do, once; the answer is kept."""
        if self._capabilities is None:
            try:
                self._capabilities = await self._inspect()
            except UldError as error:
                mistaken = await wrong_backend(self.http, self.name, error)
                if mistaken is None:
                    raise
                raise mistaken from error
        return self._capabilities

    @abstractmethod
    async def _inspect(self) -> Capabilities:
        """Ask the server what it can do, and check its tokenizer."""

    @abstractmethod
    async def _tokenize(self, text: str) -> list[int] | None:
        """The server's own ids for a text, None where it has no such route."""

    @abstractmethod
    def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """Let the server write up to n tokens after the prefix, and hand over the pieces as they arrive."""

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """The prefix itself: this server takes ids."""
        return prefix

    async def aclose(self) -> None:
        """Close connections."""
        await self.http.aclose()

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> Draft:
        """A whole draft of up to n tokens; a broken stream is asked for again."""

        async def once() -> Draft:
            tokens: list[int] = []
            positions: list[TopLogprobs] = []
            finish = None
            async with aclosing(self.stream(prefix, n, sampling)) as pieces:
                async for piece in pieces:
                    tokens.extend(piece.tokens)
                    positions.extend(piece.positions)
                    finish = piece.finish
            return Draft(tuple(tokens), tuple(positions), finish)

        return await self.http.retrying()(once)

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """Log p_M of given tokens, out of greedy drafts: one request runs as long as the server agrees with the text."""
        prefix, wanted = list(prefix), list(continuation)
        positions: list[TopLogprobs] = []
        while len(positions) < len(wanted):
            done = len(positions)
            if self.resume([*prefix, *wanted[:done]]) != [*prefix, *wanted[:done]]:
                raise self.unscorable(done)
            positions.extend(await self._agreed([*prefix, *wanted[:done]], wanted[done:]))
            if not positions[-1].ids.size:
                raise LogprobsUnavailable(
                    f"{self.name} ends its answer after {len(positions) - 1} tokens of this text, and reports nothing there",
                    hint="score shorter texts, or use a server that reports the token which ends an answer",
                )
        values = [top.of(token) for token, top in zip(wanted, positions, strict=True)]
        return Score(tuple(wanted), np.array([np.nan if v is None else v for v in values]), tuple(positions))

    def unscorable(self, done: int) -> BackendError:
        """The error for a text that cannot be gone on with after `done` of its tokens."""
        return RequestRejected(
            f"{self.name} cannot score this text: it takes text only, and token {done} is not how it splits the text",
            hint="score text that the tokenizer splits in its own way, or use a server that takes token ids",
        )

    async def _agreed(self, prefix: list[int], wanted: list[int]) -> list[TopLogprobs]:
        """K at each position to the first at which the server writes another token than wanted, where the request is cancelled."""

        async def once() -> list[TopLogprobs]:
            found: list[TopLogprobs] = []
            async with aclosing(self.stream(prefix, len(wanted))) as pieces:
                async for piece in pieces:
                    for token, top in zip(piece.tokens, piece.positions, strict=True):
                        found.append(top)
                        if token != wanted[len(found) - 1] or len(found) == len(wanted):
                            return found
            if not found:
                raise MalformedAnswer("the server wrote nothing where a token was to be scored")
            return found

        return await self.http.retrying()(once)

    def read_position(self, token: int, top: TopLogprobs, sampling: ServerSampling, *, wanted: int | None = None) -> TopLogprobs:
        """Check one reported position before anybody relies on it.

        K must hold as many tokens as were asked for, and a greedy server's token must be its own most probable one. What a
        server reports beyond its top k is dropped: unreported tokens may be more probable than that.
        """
        self.check_report(top, self.top_logprobs if wanted is None else wanted)
        if sampling.greedy:
            value = top.of(token)
            if value is None or value < top.logprobs[0] - GREEDY_TOLERANCE:
                raise MalformedAnswer(f"{self.name} did not write its most probable token although greedy text was asked for")
        return top.first(self.top_logprobs)

    def check_report(self, top: TopLogprobs, expected: int) -> None:
        """Refuse a report that is empty, too short, or no logarithm of probabilities."""
        if top.ids.size == 0:
            raise LogprobsUnavailable(f"{self.name} reported no log-probabilities for a token", hint=self.logprobs_hint)
        if top.ids.size + len(top.neutral) < expected:
            raise MalformedAnswer(f"{self.name} reported {top.ids.size} of {expected} log-probabilities for a token")
        if not np.logaddexp.reduce(top.logprobs) <= MASS_TOLERANCE:
            raise LogprobsUnavailable(
                f"{self.name} reports values that are no log-probabilities: they sum to more than 1", hint=self.logprobs_hint
            )

    logprobs_hint = "start the server with log-probabilities enabled"

    def finish_reason(self, stopped: bool, tokens: Sequence[int]) -> FinishReason:
        """STOP is believed only when the token that ended the answer was reported, so that it can be verified."""
        if not stopped:
            return FinishReason.LENGTH
        if not tokens:
            raise MalformedAnswer(f"{self.name} ended the answer without reporting the end token")
        self.end_ids = self.end_ids | {tokens[-1]}
        return FinishReason.STOP

    async def _check_tokenizer(self) -> tuple[str, ...]:
        """Compare the server's ids for the corpus with the tokenizer's; notes for the capabilities."""
        for text in CORPUS:
            theirs = await self._tokenize(text)
            if theirs is None:
                return ("the server has no /tokenize route: its tokenizer was not compared",)
            ours = self.tokenizer.encode(text, add_special_tokens=False)
            if theirs != ours:
                at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
                raise TokenizerMismatch(
                    f"the server at {self.http.base_url} and the tokenizer {name_of(self.tokenizer)} split {text[:40]!r} differently"
                    f" from token {at} on (server {theirs[at : at + 4]}, tokenizer {ours[at : at + 4]})",
                    hint="pass tokenizer=... of the served model; the assistant's may be another",
                )
        return ()

    def _lower_top(self, error: RequestRejected) -> int | None:
        """Read the server's cap on k out of its refusal, and go on with it; None when the refusal speaks of something else."""
        if "logprobs" not in error.message and "top_n_tokens" not in error.message:
            return None
        found = re.search(r"(?:<=|max(?:imum)? allowed:?|at most|less than or equal to|maximum of)\s*(\d+)", error.message)
        cap = int(found.group(1)) if found else 0
        if not 0 < cap < self.top_logprobs:
            raise LogprobsUnavailable(f"{self.name} gives no log-probabilities: {error.message}", hint=self.logprobs_hint) from error
        self._cap_top(cap, self.logprobs_hint)
        return cap

    def _cap_top(self, cap: int, why: str) -> None:
        """Go on with fewer log-probabilities than were asked for, and warn where the user named the number."""
        if self._asked_for_top:
            warnings.warn(
                f"{self.http.base_url} gives the top {cap} log-probabilities, not {self.top_logprobs}; going on with {cap}. {why}",
                CapabilityWarning,
                stacklevel=2,
            )
        self.top_logprobs = cap

    async def _probe_top(self, prefix: Sequence[int]) -> int | None:
        """Ask for one token with k log-probabilities, lowering k to the server's cap; returns the cap if one was met."""
        cap: int | None = None
        while True:
            try:
                await self.draft(prefix, 1)
                return cap
            except RequestRejected as error:
                cap = self._lower_top(error)
                if cap is None:
                    raise
