"""A backend from outside the distribution: a model that says one sentence, whatever it is asked."""

import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.errors import UsageError
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs
from uld_adapters.vocabulary.tokens import load_tokenizer

GREEDY = ServerSampling()
SURE, RIVAL = math.log(0.9), math.log(0.05)


class ParrotBackend:
    """Says the sentence given as `model`, with probability 0.9 at each token; 0.05 goes to the next id of the vocabulary."""

    name = "parrot"

    def __init__(self, *, model: str = "Hello.", tokenizer: Any = None, **options: Any) -> None:
        if tokenizer is None:
            raise UsageError("the parrot has no tokenizer", hint="pass tokenizer=...")
        self.tokenizer = load_tokenizer(tokenizer)
        self._sentence: list[int] = [*self.tokenizer.encode(model, add_special_tokens=False), self.tokenizer.eos_token_id]
        self._prompt: int | None = None

    async def probe(self) -> Capabilities:
        """It gives two log-probabilities, and draws nothing at random."""
        return Capabilities(model="parrot", top_logprobs=2, top_logprobs_cap=2, sampling=frozenset(), scoring="drafts")

    def _top(self, token: int) -> TopLogprobs:
        return TopLogprobs.build([token, (token + 1) % len(self.tokenizer)], [SURE, RIVAL])

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncIterator[Draft]:
        """One piece a token; the end token closes the sentence."""
        if self._prompt is None:
            self._prompt = len(prefix)
        rest = self._sentence[len(prefix) - self._prompt :][:n]
        for index, token in enumerate(rest):
            last = index == len(rest) - 1
            ended = FinishReason.STOP if token == self._sentence[-1] else FinishReason.LENGTH
            yield Draft((token,), (self._top(token),), ended if last else None)

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> Draft:
        """The pieces of `stream` in one."""
        pieces = [piece async for piece in self.stream(prefix, n, sampling)]
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        return Draft(tokens, tuple(top for piece in pieces for top in piece.positions), pieces[-1].finish)

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """The parrot's own probability of a text: 0.9 a token where it is what it says."""
        tops = tuple(self._top(token) for token in self._sentence[: len(continuation)])
        found = [top.of(token) for token, top in zip(continuation, tops, strict=True)]
        return Score(tuple(continuation), np.array([math.nan if value is None else value for value in found]), tops)

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """It takes ids."""
        return prefix

    async def aclose(self) -> None:
        """Nothing is open."""
