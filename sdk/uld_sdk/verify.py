"""Which drafted tokens stand, and what replaces the first that does not. Pure: no I/O, no model."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Ensemble, Rule, ensemble, uld_shift, untouched
from uld_sdk.sampling import Sampling, gumbel, process


class Mode(StrEnum):
    """How a draft is verified: against the best token (greedy), or by drawing."""

    GREEDY = "greedy"
    PASS_THROUGH = "pass-through"
    MATCH = "match"


class SmallReading(Protocol):
    """What the small model thinks at one prefix (uld_offset_models.scorer.Reading)."""

    @property
    def peak(self) -> float:
        """The largest excess log p_a - log u in nats, or an upper bound of it."""

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""

    def excess(self) -> np.ndarray:
        """Log p_a(y|x) - log u(y) in nats, shape (rows,)."""


@dataclass(frozen=True)
class Verdict:
    """What is decided at one position: the ranking of tokens to write there, best first, and how certain that is.

    `bound` is the total variation to the distribution with a complete report; 0 when `exact`.
    """

    ranking: tuple[int, ...]
    touched: bool
    exact: bool
    bound: float

    @property
    def token(self) -> int:
        """The best of the ranking."""
        return self.ranking[0]


def is_touched(reading: SmallReading | None, rule: Rule) -> bool:
    """Whether the assistant moves anything at this prefix; reads the prefix only, never the drafted token."""
    return reading is not None and not untouched(reading.peak, rule)


def stands_unseen(reading: SmallReading | None, rule: Rule, mode: Mode) -> bool:
    """Whether the drafted token stands whatever the server reported: an untouched position outside match mode."""
    return mode is not Mode.MATCH and not is_touched(reading, rule)


def judge(top: TopLogprobs, reading: SmallReading | None, rule: Rule, sampling: Sampling, mode: Mode, position: int) -> Verdict:
    """Decide one position from the raw report K and the small model's reading.

    greedy: argmax q. match: argmax over log q + Gumbel noise of (seed, position). pass-through: a fresh draw from q, the
    user's sampling applied. An untouched position has q = p_M, without the filter.
    """
    touched = is_touched(reading, rule)
    if touched and reading is not None:
        shift = uld_shift(reading.excess(), rule)
        q = ensemble(top, shift, rule.filter)
    else:
        q = Ensemble(top.ids, top.logprobs, 0.0, top.tail_mass, True)
    if sampling.greedy:
        return Verdict(tuple(q.ids.tolist()), touched, q.beaten, 0.0 if q.beaten else q.bound)
    drawn = process(q.logprobs, sampling)
    if mode is Mode.MATCH:
        drawn = drawn + gumbel(sampling.seed or 0, position, q.ids)
        order = np.argsort(-drawn, kind="stable")
    else:
        noise = np.random.default_rng().gumbel(size=drawn.size)
        order = np.argsort(-(drawn + noise), kind="stable")
    ranking = tuple(int(q.ids[i]) for i in order if np.isfinite(drawn[i]))
    bound = sampled_bound(q, top, sampling)
    return Verdict(ranking, touched, bound == 0.0, bound)


def sampled_bound(q: Ensemble, top: TopLogprobs, sampling: Sampling) -> float:
    """Total variation that the unreported tail can cause after temperature: w_T / (Z_T + w_T), an upper bound.

    Below temperature 1 the tail's weight sum p^(1/T) is at most w * p_k^(1/T - 1); above it at most N * (w/N)^(1/T) for N
    unreported tokens. Within a top-k no larger than K nothing unreported can matter.
    """
    if q.unseen == 0.0 or (sampling.top_k is not None and sampling.top_k <= q.ids.size and q.beaten):
        return 0.0
    power = 1.0 / sampling.temperature
    kept = np.exp((q.logprobs + q.log_normaliser) * power).sum()
    if power >= 1:
        tail = q.unseen * np.exp(top.logprobs[-1] * (power - 1))
    else:
        count = 1e6  # more than any vocabulary has tokens
        tail = count * (q.unseen / count) ** power
    return float(tail / (kept + tail))
