"""The values that pass between the rooms: what a server reported at a position, a draft, a score."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

MASKED = -9000.0  # servers write null, -9999.0 or -3.4e38 where a token was masked: no probability at all


class FinishReason(StrEnum):
    """Why a server or an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    REFUSAL = "refusal"


@dataclass(frozen=True, slots=False)
class TopLogprobs:
    """The reported set K(x) at one position: distinct token ids with log p_M in nats, most probable first.

    `complete` says that K is the whole vocabulary, so that the tail mass m = 1 - sum_K p_M is zero. `neutral` are log p_M, or upper
    bounds of it, of reported tokens that nobody can tell from others, such as half characters without their bytes: they belong to
    the tail, are never chosen, and may be more probable than what else lies there.
    """

    ids: Int[np.ndarray, " k"]
    logprobs: Float[np.ndarray, " k"]
    complete: bool = False
    neutral: tuple[float, ...] = ()

    @classmethod
    def build(
        cls, ids: "list[int] | np.ndarray", logprobs: "list[float] | np.ndarray", *, complete: bool = False, neutral: Sequence[float] = ()
    ) -> "TopLogprobs":
        """Sort by log-probability, drop masked entries and duplicate ids (the larger value stays)."""
        token_ids = np.asarray(ids, dtype=np.int64)
        values = np.asarray(logprobs, dtype=np.float64)
        order = np.lexsort((token_ids, -values))
        order = order[values[order] > MASKED]
        token_ids, values = token_ids[order], values[order]
        if not complete:
            _, first = np.unique(token_ids, return_index=True)
            first.sort()
            token_ids, values = token_ids[first], values[first]
        return cls(token_ids, values, complete, tuple(neutral))

    @classmethod
    def unreported(cls) -> "TopLogprobs":
        """Nothing at all: an end of the answer that the server does not report."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0))

    @property
    def ceiling(self) -> float:
        """Log p_M in nats that no token outside K exceeds: log p_k, or a neutral token's; 0 where nothing is reported."""
        return max((float(self.logprobs[-1]), *self.neutral)) if self.ids.size else 0.0

    @cached_property
    def tail_mass(self) -> float:
        """The tail mass m = 1 - sum_K p_M, the probability of all tokens that were not reported."""
        if self.complete:
            return 0.0
        return float(max(0.0, 1.0 - np.exp(self.logprobs).sum()))

    @property
    def overshadowed(self) -> bool:
        """Whether a neutral token may be the most probable of all."""
        return bool(self.neutral) and max(self.neutral) > self.logprobs[0]

    def first(self, k: int) -> "TopLogprobs":
        """The k most probable; a server that adds the token it wrote reports one that is no part of its top k."""
        return self if self.ids.size <= k else TopLogprobs(self.ids[:k], self.logprobs[:k], neutral=self.neutral)

    def of(self, token: int) -> float | None:
        """Log p_M of one token in nats, None when it was not reported."""
        where = np.flatnonzero(self.ids == token)
        return float(self.logprobs[where[0]]) if where.size else None


@dataclass(frozen=True)
class Draft:
    """Consecutive tokens a server wrote, with K at each position; one piece of a stream, or a whole answer.

    `tokens[i]` was drawn by the server at the position described by `positions[i]`. `finish` is set on the last piece of
    a request: STOP when the server ended the answer (the end token is the last of `tokens`; where the server does not report
    it, with an unreported position). `prompt_tokens` is set on the last piece where only the server can count its prompt.
    """

    tokens: tuple[int, ...]
    positions: tuple[TopLogprobs, ...]
    finish: FinishReason | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.positions):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.positions)} positions")


@dataclass(frozen=True)
class Score:
    """log p_M of given tokens: `logprobs[i]` in nats, NaN where the server would not say; `positions[i]` is K there.

    Where `logprobs[i]` is NaN the token lies outside K, so its log-probability is at most `positions[i].logprobs[-1]`.
    """

    tokens: tuple[int, ...]
    logprobs: Float[np.ndarray, " n"]
    positions: tuple[TopLogprobs, ...]
