"""How far off an unlearned distribution can be when the small model's values are known within bounds only. Pure."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Rule, uld_shift
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
    """Total variation, at most, between q from `excess` and q from any excess between `least` and `most` (nats).

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


def _scores(top: TopLogprobs, least: np.ndarray, most: np.ndarray, excess: np.ndarray, rule: Rule) -> tuple[np.ndarray, ...]:
    """Log p_M + g in nats over the kept set: the least, the most, and as taken."""
    real = top.ids < excess.size
    ids, logprobs = top.ids[real], top.logprobs[real]
    kept = logprobs >= logprobs[:1] + np.log(rule.filter) if rule.filter > 0 else np.ones(ids.size, dtype=bool)
    ids, logprobs = ids[kept], logprobs[kept]
    return tuple(logprobs + uld_shift(values[ids], rule) for values in (most, least, excess))


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
