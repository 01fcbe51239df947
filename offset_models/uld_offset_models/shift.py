"""From the small model's log-probabilities to the shift g, and from shift and report to the unlearned distribution q."""

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
from jaxtyping import Bool, Float, Int

from uld_adapters.errors import MalformedAnswer, UsageError
from uld_adapters.logprobs import TopLogprobs

MOST = 1e300  # nats; a log-probability above its negative is one
Method = Literal["uld", "offset"]
Tail = Literal["truncate", "complete"]
SIGNS = {
    "uld": "the formula subtracts what an assistant knows: the minus is in the formula",
    "offset": "the formula adds a pair's change: the pair itself was trained to forget",
}


Bounds = tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]


class SmallReading(Protocol):
    """What the small model thinks at one prefix (`scorer.Reading`)."""

    @property
    def peak(self) -> float:
        """The largest excess in nats, of a pair the largest size of a change, or an upper bound of it."""

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""

    def excess(self) -> Float[np.ndarray, " rows"]:
        """Log p_a(y|x) - log u(y), or of a pair c (log p_o'(y|x) - log p_o(y|x)), in nats for every token."""

    def bounds(self) -> Bounds | None:
        """The least and the most that the excess can be, None where it is exact."""


class PairReading(SmallReading, Protocol):
    """What a pair thinks at one prefix (`pair_scorer.PairReading`)."""

    def frozen(self) -> Float[np.ndarray, " rows"] | None:
        """Log p_o(y|x) of the frozen model in nats for every token, None where it is not known for all."""


@dataclass(frozen=True)
class Rule:
    """How the small model corrects the large one: alpha, the margin tau in nats (0: off), the filter's ratio r (0: off).

    `method` names the formula, `uld_shift` or `offset_shift`. `tail` says what stands for the tokens that the server did not
    report: nothing (`truncate`), or what the frozen small model thinks of them (`complete`, of a pair only).
    """

    alpha: float = 0.75
    margin: float = 3.0
    filter: float = 0.01
    method: Method = "uld"
    tail: Tail = "truncate"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < np.inf:
            raise UsageError(f"alpha is {self.alpha}", hint=f"give 0 or more; {SIGNS[self.method]}")
        if not 0 <= self.margin < np.inf:
            raise UsageError(f"margin is {self.margin} nats", hint="give 0 (off) or more; 3 is usual")
        if not 0 <= self.filter < 1:
            raise UsageError(f"filter is {self.filter}", hint="give a ratio in [0, 1); 0.01 is usual")
        if self.tail == "complete" and self.method == "uld":
            raise UsageError("an assistant has no frozen model that could complete the tail", hint="use tail truncate, or a pair")

    def touching(self, reading: SmallReading) -> tuple[int, ...]:
        """(0,) where the one small model moves anything at the reading's prefix, () where it does not."""
        return () if untouched(reading.peak, self) else (0,)

    def shift(self, reading: SmallReading) -> Float[np.ndarray, " rows"]:
        """The shift g in nats for every token."""
        return shift_of(reading.excess(), self)

    def bounds(self, reading: SmallReading) -> Bounds | None:
        """The least and the largest shift in nats that each token can have, None where `shift` is exact."""
        ends = reading.bounds()
        if ends is None:
            return None
        low, high = (shift_of(values, self) for values in ends)
        return np.minimum(low, high), np.maximum(low, high)

    def ratio(self, reading: SmallReading) -> float:
        """The filter's ratio r at the reading's prefix."""
        return self.filter

    def frozen(self, reading: SmallReading) -> Float[np.ndarray, " rows"] | None:
        """Log p_o in nats of the model that stands for unreported tokens there, None under the tail policy `truncate`."""
        return cast(PairReading, reading).frozen() if self.tail == "complete" else None


def shift_of(values: Float[np.ndarray, "*shape"], rule: Rule) -> Float[np.ndarray, "*shape"]:
    """The shift g in nats from what the small model says of each token (`Reading.excess`)."""
    return offset_shift(values, rule) if rule.method == "offset" else uld_shift(values, rule)


def uld_shift(excess: Float[np.ndarray, "*shape"], rule: Rule) -> Float[np.ndarray, "*shape"]:
    """Return g(y) = -alpha * max(0, x - tau) for the excess x = log p_a(y|x) - log u(y); without a margin -alpha * x, of either sign.

    ULD (arXiv 2406.08607), with a margin of our own.
    """
    if rule.margin > 0:
        return -rule.alpha * np.maximum(0.0, excess - rule.margin)
    return -rule.alpha * excess


def offset_shift(change: Float[np.ndarray, "*shape"], rule: Rule) -> Float[np.ndarray, "*shape"]:
    """Return g(y) = alpha * sign(d) * max(0, |d| - tau) for the change d = c (log p_o'(y|x) - log p_o(y|x)).

    Delta-unlearning (arXiv 2404.11045, equation 3), with a gate c and a soft threshold of our own.
    """
    return rule.alpha * np.sign(change) * np.maximum(0.0, np.abs(change) - rule.margin)


def untouched(peak: float, rule: Rule) -> bool:
    """Whether g is 0 for the whole vocabulary: the largest excess, or of a pair the largest |change|, of all tokens is at most tau."""
    if rule.alpha == 0:
        return True
    # What is nowhere above the uniform distribution is that distribution; without a margin nobody can prove so much of an assistant.
    return peak <= rule.margin and (rule.margin > 0 or rule.method == "offset")


@dataclass(frozen=True)
class Ensemble:
    """q over the kept set F: `ids` and log q in nats (normalised over F), most probable first.

    `tail` is the mass m of the unreported tokens, 0 when F is known to lie inside K; `least` is what log p_M none of them exceeds,
    and `highest` the largest g among them.
    """

    ids: Int[np.ndarray, " kept"]
    logprobs: Float[np.ndarray, " kept"]
    log_normaliser: float
    tail: float
    least: float
    highest: float

    @property
    def scores(self) -> Float[np.ndarray, " kept"]:
        """Log p_M + g in nats, before the division by Z_K."""
        return self.logprobs + self.log_normaliser

    @property
    def unseen(self) -> float:
        """What the unreported tail weighs beside Z_K at most, in nats: log w = log m + max over v outside K of g(v); -inf without one."""
        return float(np.log(self.tail)) + self.highest if self.tail else -np.inf

    @property
    def ceiling(self) -> float:
        """The score in nats that no unreported token exceeds, log p_k + max g; -inf without a tail."""
        return self.least + self.highest if self.tail else -np.inf

    @property
    def beaten(self) -> bool:
        """Whether no unreported token can score above the best of F."""
        return bool(self.scores[0] >= self.ceiling)

    @property
    def bound(self) -> float:
        """Total variation to the full-vocabulary ensemble is at most w / (Z_K + w)."""
        return float(np.exp(self.unseen - np.logaddexp(self.log_normaliser, self.unseen))) if self.tail else 0.0


def reported(top: TopLogprobs) -> Ensemble:
    """The remote's own report as a q: g = 0 everywhere, no filter, Z_K = 1."""
    return Ensemble(top.ids, top.logprobs, 0.0, top.tail_mass, top.ceiling, 0.0)


def unreported(ids: Int[np.ndarray, " k"], rows: int) -> Bool[np.ndarray, " rows"]:
    """Which rows of the vocabulary are not among the ids of K, of which some may be padding."""
    outside = np.ones(rows, dtype=bool)
    outside[ids[ids < rows]] = False
    return outside


def ensemble(top: TopLogprobs, shift: Float[np.ndarray, " rows"], ratio: float) -> Ensemble:
    """q(y|x) = p_M(y|x) * exp(g(y)) / Z on F = {y in K : log p_M(y) >= max log p_M + ln r}, 0 elsewhere.

    `shift` is g for every real row of the vocabulary; reported ids beyond it are padding and are dropped. Raises
    MalformedAnswer when nothing else was reported.
    """
    real = top.ids < shift.size
    ids, logprobs = top.ids[real], top.logprobs[real]
    if not ids.size:
        raise MalformedAnswer("the server reported only ids that its tokenizer does not have")
    floor = logprobs[0] + np.log(ratio) if ratio > 0 else -np.inf
    kept = logprobs >= floor
    score = logprobs[kept] + shift[ids[kept]]
    log_z = logsumexp(score)
    outside = unreported(top.ids, shift.size)
    least = max((float(logprobs[-1]), *top.neutral))
    inside = top.complete or least < floor or not outside.any()
    highest = 0.0 if inside else float(shift[outside].max())
    order = np.lexsort((ids[kept], -score))
    return Ensemble(ids[kept][order], score[order] - log_z, log_z, 0.0 if inside else top.tail_mass, least, highest)


def completed(top: TopLogprobs, frozen: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Log p_M of every real row with the tail filled in by the frozen small model: log m + log p_o(v) - log p_o(not K) outside K.

    `frozen` is log p_o for every real row of the vocabulary. Without a tail what is outside K is -inf.
    """
    real = top.ids < frozen.size
    filled = frozen.copy()
    filled[top.ids[real]] = -np.inf
    if top.complete or not top.tail_mass or not np.isfinite(filled).any():
        filled[:] = -np.inf
    else:
        filled += np.log(top.tail_mass) - logsumexp(filled)
    filled[top.ids[real]] = top.logprobs[real]
    return filled


def completed_ensemble(top: TopLogprobs, frozen: Float[np.ndarray, " rows"], shift: Float[np.ndarray, " rows"], ratio: float) -> Ensemble:
    """The ensemble over the whole vocabulary, p_M being `completed`: F lies inside what is known then, or estimated."""
    whole = completed(top, frozen)
    ids = np.flatnonzero(whole >= (whole.max() + np.log(ratio) if ratio > 0 else -MOST))
    score = whole[ids] + shift[ids]
    log_z = logsumexp(score)
    order = np.argsort(-score)
    return Ensemble(ids[order], score[order] - log_z, log_z, 0.0, -np.inf, 0.0)


def logsumexp(values: Float[np.ndarray, " n"]) -> float:
    """Log of the sum of exponentials; many times faster than `np.logaddexp.reduce` over a vocabulary."""
    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum()))
