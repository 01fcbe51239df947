"""How far off an unlearned distribution can be when the small model's values are known within bounds only. Pure."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Rule, shift_of
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Verdict


def shifted_bound(
    top: TopLogprobs,
    least: Float[np.ndarray, " rows"],
    most: Float[np.ndarray, " rows"],
    excess: Float[np.ndarray, " rows"],
    rule: Rule,
    *,
    temperature: float = 1.0,
) -> float:
    """Total variation, at most, between q from `excess` and q from anything between `least` and `most` (excess or change, in nats).

    With weights w = p_M exp(g) a token has at most w_high / (w_high + the others' w_low), and at least w_low / (w_low + their w_high).
    """
    low, high, mid = _scores(top, least, most, excess, rule)
    if not low.size:
        return 0.0
    weights = [np.exp((scores - high.max()) / temperature) for scores in (low, high, mid)]
    (lows, highs, mids) = weights
    share = mids / mids.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.nan_to_num(highs / (highs + lows.sum() - lows), nan=1.0)
        smallest = np.nan_to_num(lows / (lows + highs.sum() - highs), nan=0.0)
    bound = min(float(np.maximum(0, largest - share).sum()), float(np.maximum(0, share - smallest).sum()), 1.0)
    return bound if bound > 1e-9 else 0.0


def _kept(top: TopLogprobs, rows: int, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """The kept set F with log p_M in nats."""
    real = top.ids < rows
    ids, logprobs = top.ids[real], top.logprobs[real]
    kept = logprobs >= logprobs[:1] + np.log(rule.filter) if rule.filter > 0 else np.ones(ids.size, dtype=bool)
    return ids[kept], logprobs[kept]


def _scores(top: TopLogprobs, least: np.ndarray, most: np.ndarray, excess: np.ndarray, rule: Rule) -> tuple[np.ndarray, ...]:
    """Log p_M + g in nats over the kept set: the least, the most, and as taken."""
    ids, logprobs = _kept(top, excess.size, rule)
    ends = [shift_of(values[ids], rule) for values in (least, most)]
    return logprobs + np.minimum(*ends), logprobs + np.maximum(*ends), logprobs + shift_of(excess[ids], rule)


def score_bounds(
    token: int,
    value: float,
    top: TopLogprobs,
    bounds: tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]],
    rule: Rule,
) -> tuple[float, float]:
    """Both ends of log q of a token at a touched position; `value` is log p_M of it in nats, NaN where it is not known.

    The token's weight and the others' lie between those of the least and the most shift; the unreported tail weighs from nothing
    to its mass with the largest shift.
    """
    low, high, _ = _scores(top, *bounds, bounds[0], rule)
    ids = _kept(top, bounds[0].size, rule)[0]
    floor = top.logprobs[0] + np.log(rule.filter) if rule.filter > 0 else -np.inf
    tail = 0.0 if top.complete or top.logprobs[-1] < floor else top.tail_mass
    ends = [shift_of(values, rule) for values in bounds]
    outside = np.ones(bounds[0].size, dtype=bool)
    outside[top.ids[top.ids < outside.size]] = False
    unseen = np.log(tail) + max(float(end[outside].max()) for end in ends) if tail and outside.any() else -np.inf
    mine = ids == token
    if mine.any():
        least, most = float(low[mine][0]), float(high[mine][0])
    elif np.isnan(value) and tail:
        least, most = -np.inf, top.ceiling + float(max(end[token] for end in ends))
    elif tail and value >= floor:
        least, most = (value + float(pick(end[token] for end in ends)) for pick in (min, max))
    else:
        return -np.inf, -np.inf
    others = [np.logaddexp.reduce(scores[~mine]) if (~mine).any() else -np.inf for scores in (low, high)]
    widest = np.logaddexp(np.logaddexp(others[1], unseen), least)
    return (least - float(widest) if np.isfinite(least) else -np.inf), min(0.0, most - float(np.logaddexp(others[0], most)))


def widened(
    verdict: Verdict,
    top: TopLogprobs,
    bounds: tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]],
    excess: Float[np.ndarray, " rows"],
    rule: Rule,
    sampling: Sampling,
) -> Verdict:
    """A verdict with what the bounds of the excess add to its own bound.

    A greedy one stays exact where its token beats all others whatever the excess is within the bounds.
    """
    plain = sampling.greedy or (sampling.top_k is None and (sampling.top_p or 1.0) >= 1.0 and not sampling.min_p)
    temperature = 1.0 if sampling.greedy else sampling.temperature
    more = shifted_bound(top, *bounds, excess, rule, temperature=temperature)
    if not more:
        return verdict
    if sampling.greedy:
        low, high, mid = _scores(top, *bounds, excess, rule)
        best = int(mid.argmax())
        if verdict.exact and (np.delete(high, best) <= low[best]).all():
            return verdict
    elif not plain:
        more = 1.0
    return replace(verdict, exact=False, bound=min(1.0, verdict.bound + more))
