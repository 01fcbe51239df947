"""Which drafted tokens stand, and what replaces the first that does not. Pure: no I/O, no model."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Ensemble, Rule, ensemble, reported, uld_shift, untouched
from uld_sdk.sampling import Sampling, gumbel, process

MANY = float(np.log(1e6))  # more tokens than any vocabulary has


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


def undone(top: TopLogprobs, temperature: float) -> TopLogprobs:
    """A report after temperature T as if before it: log p = T * log p' + constant, for differences are all that q needs.

    Of the tail mass m' is left an upper bound, m' * p'_k^(T-1) for T >= 1 and N^(1-T) * m'^T below.
    """
    raw = top.logprobs * temperature
    total = float(np.logaddexp.reduce(raw))
    if top.tail_mass:
        mass = np.log(top.tail_mass)
        tail = mass + (temperature - 1) * float(top.logprobs[-1]) if temperature >= 1 else temperature * mass + (1 - temperature) * MANY
        total = float(np.logaddexp(total, tail))
    return TopLogprobs(top.ids, raw - total, top.complete)


def judge(top: TopLogprobs, reading: SmallReading | None, rule: Rule, sampling: Sampling, mode: Mode, position: int) -> Verdict:
    """Decide one position from the raw report K and the small model's reading.

    greedy: argmax q. match: argmax over log q + Gumbel noise of (seed, position). pass-through: a fresh draw from q, the
    user's sampling applied. An untouched position has q = p_M, without the filter.
    """
    touched = is_touched(reading, rule)
    q = ensemble(top, uld_shift(reading.excess(), rule), rule.filter) if touched and reading is not None else reported(top)
    if sampling.greedy:
        return Verdict(tuple(q.ids.tolist()), touched, q.beaten, 0.0 if q.beaten else q.bound)
    # What the tail weighs is known only where nothing moves it: no shift, no temperature, no cut before top-p.
    known = not touched and sampling.temperature == 1.0 and sampling.top_k is None
    drawn = process(q.logprobs, sampling, tail=q.tail if known else 0.0)
    if mode is Mode.MATCH:
        noise = gumbel(sampling.seed or 0, position, q.ids)
    else:
        noise = np.random.default_rng().gumbel(size=drawn.size)
    order = np.argsort(-(drawn + noise), kind="stable")
    kept = np.isfinite(drawn)
    bound = sampled_bound(q, sampling, kept, known=known)
    return Verdict(tuple(int(q.ids[i]) for i in order if kept[i]), touched, bound == 0.0, bound)


def sampled_bound(q: Ensemble, sampling: Sampling, kept: np.ndarray, *, known: bool) -> float:
    """An upper bound of the total variation that the unreported tail can cause after the user's sampling.

    With a = 1/T and tokens weighing x = exp(a * score), the tail weighs at most m * p_k^(a-1) * exp(a * max g) for a >= 1, else
    N^(1-a) * m^a * exp(a * max g) for N unreported tokens, and none of them more than `rival`. `kept` marks what was drawn
    from; `known` says that the tail counted in top-p's sum.
    """
    if not q.tail:
        return 0.0
    power = 1.0 / sampling.temperature
    weight = np.exp(power * (q.scores - q.scores[0]))  # most probable first
    rival = np.exp(power * (q.ceiling - q.scores[0]))
    of_tail = power * np.log(q.tail) + (power - 1) * (q.least - np.log(q.tail) if power >= 1 else -MANY)
    tail = np.exp(of_tail + power * (q.highest - q.scores[0]))
    cut = sampling.min_p or 0.0
    if sampling.top_k is not None and sampling.top_k <= weight.size:
        weight, kept = weight[: sampling.top_k], kept[: sampling.top_k]
        if weight[-1] >= rival:
            return 0.0  # the k best are all reported
    nucleus = sampling.top_p is not None and sampling.top_p < 1
    if (cut and rival > 1) or (nucleus and sampling.top_k is not None):
        return 1.0
    mine = float(weight[kept].sum())
    if not nucleus:
        widest = mine if sampling.top_k is not None else mine + tail  # in a top-k a rival takes the place of another
        return min(1.0, float(tail / widest)) if rival >= cut else 0.0
    mass = np.cumsum(weight)
    nearest, farthest = (np.searchsorted(mass, (sampling.top_p or 1.0) * (mass[-1] + extra)) for extra in (tail if known else 0.0, tail))
    if nearest < weight.size and weight[nearest] < rival:
        return 1.0
    inside = farthest < weight.size and weight[farthest] >= rival
    reach = weight[: farthest + 1] if inside else weight
    widest = float(reach[reach >= cut].sum()) + (tail if rival >= cut and not inside else 0.0)
    bound = 1.0 - mine / widest
    return bound if bound > 1e-9 else 0.0
