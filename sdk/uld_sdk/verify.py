"""Which drafted tokens stand, and what replaces the first that does not. Pure: no I/O, no model."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.several import JointRule
from uld_offset_models.shift import Ensemble, Rule, completed_ensemble, ensemble, reported
from uld_sdk.sampling import Sampling, gumbel, process

_ROUNDED = 1e-15  # a tail mass that rounding takes away, and a low temperature brings back
MANY = float(np.log(1e6))  # more tokens than any vocabulary has
_HUGE = 600.0  # nats: beside such a weight nothing else counts


class Mode(StrEnum):
    """How a draft is verified: against the best token (greedy), or by drawing."""

    GREEDY = "greedy"
    PASS_THROUGH = "pass-through"
    MATCH = "match"


@dataclass(frozen=True)
class Verdict:
    """What is decided at one position: the ranking of tokens to write there, best first, and how certain that is.

    `bound` is the total variation to the distribution with a complete report; 0 when `exact`. `completed` says that the
    ranking counts tokens which were not reported, by the frozen small model's estimate.
    """

    ranking: tuple[int, ...]
    touched: bool
    exact: bool
    bound: float
    completed: bool = False

    @property
    def token(self) -> int:
        """The best of the ranking."""
        return self.ranking[0]


def touching(reading: Any, rule: Rule | JointRule) -> tuple[int, ...]:
    """The places of the assistants that move anything at this prefix; reads the prefix only, never the drafted token."""
    return () if reading is None else rule.touching(reading)


def is_touched(reading: Any, rule: Rule | JointRule) -> bool:
    """Whether any assistant moves anything at this prefix."""
    return bool(touching(reading, rule))


def stands_unseen(reading: Any, rule: Rule | JointRule, mode: Mode) -> bool:
    """Whether the drafted token stands whatever the server reported: an untouched position outside match mode."""
    return mode is not Mode.MATCH and not is_touched(reading, rule)


def end_stands(reading: Any, rule: Rule | JointRule, sampling: Sampling, ends: frozenset[int]) -> bool:
    """Whether an end that a server wrote without reporting its position is q's own choice.

    A greedy server ends where p_M(end) is the largest, so that p_M(end) * exp(g(end)) is the largest, too, if no g exceeds g(end).
    Nothing can be said of a draw.
    """
    if reading is None or not sampling.greedy:
        return False
    shift = rule.shift(reading)
    least, most = rule.bounds(reading) or (shift, shift)
    return all(least[end] >= np.delete(most, end).max() for end in ends if end < shift.size)


def undone(top: TopLogprobs, temperature: float) -> TopLogprobs:
    """A report after temperature T as if before it: log p = T * log p' + constant, for differences are all that q needs.

    Of the tail mass m' is left an upper bound, m' * p'_k^(T-1) for T >= 1 and N^(1-T) * m'^T below.
    """
    raw = top.logprobs * temperature
    total = float(np.logaddexp.reduce(raw))
    left = max(top.tail_mass, _ROUNDED) if temperature < 1 and not top.complete else top.tail_mass
    if left:
        mass = np.log(left)
        tail = mass + (temperature - 1) * float(top.logprobs[-1]) if temperature >= 1 else temperature * mass + (1 - temperature) * MANY
        total = float(np.logaddexp(total, tail))
    return TopLogprobs(top.ids, raw - total, top.complete, tuple(value * temperature - total for value in top.neutral))


def judge(
    top: TopLogprobs,
    reading: Any,
    rule: Rule | JointRule,
    sampling: Sampling,
    mode: Mode,
    position: int,
    *,
    drafted: int | None = None,
    processed: TopLogprobs | None = None,
) -> Verdict:
    """Decide one position from the raw report K and the small model's reading.

    greedy: argmax q. match: argmax over log q + Gumbel noise of (seed, position). pass-through: the server's draw `drafted`
    stands with probability min(1, q / p_D), else a draw from max(0, q - p_D) takes its place, so that what is written has the
    distribution q (speculative sampling, arXiv 2211.17192); p_D is what the server drew from, `processed` where it reports it.
    Where p_D is not known, a fresh draw from q. An untouched position has q = p_M, without the filter. Under the tail policy
    `complete` a tail that matters is filled in; what the report alone settles stays settled by it.
    """
    touched, ratio = is_touched(reading, rule), 0.0
    if not touched:
        known = whole = reported(top)
    else:
        shift, ratio = rule.shift(reading), rule.ratio(reading)
        known = whole = ensemble(top, shift, ratio)
        unsettled = known.tail and not (sampling.greedy and known.beaten)
        if unsettled and (frozen := rule.frozen(reading)) is not None:
            whole = completed_ensemble(top, frozen, shift, ratio)
    filled = whole is not known
    cut = ratio > 0 or not sampling.uncut
    if sampling.greedy:
        bound = 0.0 if known.beaten else known.bound
        if filled:
            bound = _joined(bound, (known.ids, known.logprobs), (whole.ids, whole.logprobs), cut=cut)
        return Verdict(tuple(whole.ids.tolist()), touched, known.beaten, bound, filled)
    # What the tail weighs is known only where nothing moves it: no shift, no temperature, no cut before top-p.
    plain = not touched and sampling.temperature == 1.0 and sampling.top_k is None
    drawn = process(known.logprobs, sampling, tail=known.tail if plain else 0.0)
    bound = sampled_bound(known, sampling, np.isfinite(drawn), known=plain)
    if filled:
        estimate = process(whole.logprobs, sampling)
        bound, drawn = _joined(bound, (known.ids, drawn), (whole.ids, estimate), cut=cut), estimate
    if mode is Mode.MATCH:
        order = np.argsort(-(drawn + gumbel(sampling.seed or 0, position, whole.ids)))
    else:
        draft = (
            draft_logprobs(top, sampling)
            if processed is None
            else dict(zip(processed.ids.tolist(), processed.logprobs.tolist(), strict=True))
        )
        order = _drawn(whole.ids, drawn, draft, drafted)
    ranking = whole.ids[order[np.isfinite(drawn[order])]]
    return Verdict(tuple(ranking.tolist()), touched, bound == 0.0, bound, filled and bound > 0)


def _joined(bound: float, known: tuple[np.ndarray, np.ndarray], filled: tuple[np.ndarray, np.ndarray], *, cut: bool) -> float:
    """Total variation, at most, of what an estimated tail makes from the truth; both arguments are ids with log-probabilities.

    The truth differs from the distribution within K by `bound` at most, the estimate by what can be counted. Where nothing is cut
    both are that distribution mixed with some tail, so that the larger difference counts; else they add up.
    """
    difference = np.zeros(1 + max(int(ids.max()) for ids, _ in (known, filled)))
    for (ids, logprobs), sign in ((known, 1.0), (filled, -1.0)):
        difference[ids] += sign * np.exp(logprobs)
    apart = float(np.abs(difference).sum()) / 2
    joined = min(1.0, bound + apart) if cut else max(bound, apart)
    return joined if joined > 1e-9 else 0.0


def draft_logprobs(top: TopLogprobs, sampling: Sampling) -> dict[int, float]:
    """Log p_D in nats of the tokens that a server with these sampling options draws from, empty where the report cannot tell."""
    plain = reported(top)
    if sampling.temperature == 1.0 and sampling.uncut:
        values = plain.logprobs
    else:
        known = sampling.temperature == 1.0 and sampling.top_k is None
        values = process(plain.logprobs, sampling, tail=plain.tail if known else 0.0)
        if sampled_bound(plain, sampling, np.isfinite(values), known=known):
            return {}
    return {int(token): float(value) for token, value in zip(plain.ids, values, strict=True) if np.isfinite(value)}


def _drawn(ids: np.ndarray, log_q: np.ndarray, log_draft: dict[int, float], drafted: int | None) -> np.ndarray:
    """The order in which tokens are taken: the draft first if it stands, else by a draw from what q has beyond the draft's share.

    A drafted token that p_D does not name came out of its unreported tail, of which q has nothing that could be compared.
    """
    rng = np.random.default_rng()
    order = np.argsort(-(log_q + rng.gumbel(size=log_q.size)))
    if drafted is None or not log_draft:
        return order
    here = np.flatnonzero(ids == drafted)
    if here.size and np.log(rng.random()) < log_q[here[0]] - log_draft.get(drafted, np.inf):
        return np.concatenate([here, order[order != here[0]]])
    share = np.zeros(1 + max(int(ids.max()), *log_draft))
    share[list(log_draft)] = np.exp(list(log_draft.values()))
    beyond = np.maximum(0.0, np.exp(log_q) - share[ids])
    with np.errstate(divide="ignore"):
        drawn = np.log(beyond) + rng.gumbel(size=beyond.size)
    return np.lexsort((np.argsort(order), -drawn))  # what q has nothing more of comes last


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
    rival = np.exp(min(_HUGE, power * (q.ceiling - q.scores[0])))
    of_tail = power * np.log(q.tail) + (power - 1) * (q.least - np.log(q.tail) if power >= 1 else -MANY)
    tail = np.exp(min(_HUGE, of_tail + power * (q.highest - q.scores[0])))
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
