"""How far off an unlearned distribution can be when the small model's values are known within bounds only. Pure."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Bounds, unreported
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Verdict

_ENDLESS = 1e4  # nats


def shifted_bound(top: TopLogprobs, ends: Bounds, shift: Float[np.ndarray, " rows"], ratio: float, *, temperature: float = 1.0) -> float:
    """Total variation, at most, between q from `shift` and q from any shift between the `ends`, in nats; `ratio` is the filter's.

    With weights w = p_M exp(g) a token has at most w_high / (w_high + the others' w_low), and at least w_low / (w_low + their w_high).
    """
    _, low, high, mid = _scores(top, ends, shift, ratio)
    return _spread(low, high, mid, temperature)


def _spread(
    low: Float[np.ndarray, " kept"], high: Float[np.ndarray, " kept"], mid: Float[np.ndarray, " kept"], temperature: float
) -> float:
    """Total variation, at most, between the distribution of scores `mid` in nats and that of any scores between `low` and `high`."""
    if not mid.size:
        return 0.0
    lows, highs = (np.exp((scores - high.max()) / temperature) for scores in (low, high))
    mids = np.exp((mid - mid.max()) / temperature)
    share = mids / mids.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.nan_to_num(highs / (highs + lows.sum() - lows), nan=1.0)
        smallest = np.nan_to_num(lows / (lows + highs.sum() - highs), nan=0.0)
    bound = min(float(np.maximum(0, largest - share).sum()), float(np.maximum(0, share - smallest).sum()), 1.0)
    return bound if bound > 1e-9 else 0.0


def tail_share(mass: float, shift: float) -> float:
    """What a tail of this mass weighs at most where its tokens have a shift of at most so many nats and no others have any.

    m e^g / (1 - m + m e^g): no larger is the total variation between p_M and any such q, whether the tail gains or loses.
    """
    weight = np.log(mass) + shift
    rest = np.log1p(-mass) if mass < 1 else -np.inf
    return float(np.exp(weight - np.logaddexp(rest, weight)))


def _scores(top: TopLogprobs, ends: Bounds, shift: np.ndarray, ratio: float) -> tuple[np.ndarray, ...]:
    """The kept set F, and log p_M + g in nats over it: the least, the largest, and as taken."""
    real = top.ids < shift.size
    ids, logprobs = top.ids[real], top.logprobs[real]
    kept = logprobs >= logprobs[:1] + np.log(ratio) if ratio > 0 else np.ones(ids.size, dtype=bool)
    ids, logprobs = ids[kept], logprobs[kept]
    low, high = (np.clip(end[ids], -_ENDLESS, _ENDLESS) for end in ends)  # what is not bounded stays finite, for differences
    return ids, logprobs + low, logprobs + high, logprobs + shift[ids]


def _outside(top: TopLogprobs, high: Float[np.ndarray, " rows"], ratio: float) -> tuple[float, float]:
    """The mass of the unreported tokens and the largest shift in nats that one of them may have; 0 and -inf where all of F is reported."""
    floor = top.logprobs[0] + np.log(ratio) if ratio > 0 else -np.inf
    outside = unreported(top.ids, high.size)
    if top.complete or top.ceiling < floor or not outside.any():
        return 0.0, -np.inf
    return top.tail_mass, float(high[outside].max())


def score_bounds(token: int, value: float, top: TopLogprobs, ends: Bounds, ratio: float) -> tuple[float, float]:
    """Both ends of log q of a token at a touched position; `value` is log p_M of it in nats, NaN where it is not known.

    The token's weight and the others' lie between those of the least and the largest shift; the unreported tail weighs from nothing
    to its mass with the largest shift.
    """
    ids, low, high, _ = _scores(top, ends, ends[0], ratio)
    floor = top.logprobs[0] + np.log(ratio) if ratio > 0 else -np.inf
    tail, highest = _outside(top, ends[1], ratio)
    unseen = np.log(tail) + highest if tail else -np.inf
    mine = ids == token
    if mine.any():
        least, most = float(low[mine][0]), float(high[mine][0])
    elif np.isnan(value) and tail:
        least, most = -np.inf, top.ceiling + float(ends[1][token])
    elif tail and value >= floor:
        least, most = (value + float(end[token]) for end in ends)
    else:
        return -np.inf, -np.inf
    others = [np.logaddexp.reduce(scores[~mine]) if (~mine).any() else -np.inf for scores in (low, high)]
    widest = np.logaddexp(np.logaddexp(others[1], unseen), least)
    return (least - float(widest) if np.isfinite(least) else -np.inf), min(0.0, most - float(np.logaddexp(others[0], most)))


def widened(
    verdict: Verdict, top: TopLogprobs, ends: Bounds, shift: Float[np.ndarray, " rows"], ratio: float, sampling: Sampling
) -> Verdict:
    """A verdict with what the ends of the shift add to its own bound, whose tail is set against the least that K may weigh.

    A greedy one stays exact where its token beats all others, unreported ones included, whatever the shift is between them.
    """
    plain = sampling.greedy or (sampling.top_k is None and (sampling.top_p or 1.0) >= 1.0 and not sampling.min_p)
    temperature = 1.0 if sampling.greedy else sampling.temperature
    _, low, high, mid = _scores(top, ends, shift, ratio)
    if (high <= low).all():
        return verdict
    more = _spread(low, high, mid, temperature)
    if sampling.greedy:
        best = int(mid.argmax())
        mass, shift_beyond = _outside(top, ends[1], ratio)
        rivals = np.append(np.delete(high, best), top.ceiling + shift_beyond)
        if verdict.exact and (rivals <= low[best]).all():
            return verdict
        unseen = np.log(mass) + shift_beyond if mass else -np.inf
        tail = np.exp(unseen - np.logaddexp(np.logaddexp.reduce(low), unseen))
    else:
        more = more if plain else 1.0
        least = float(np.exp((low - mid.max()) / temperature).sum() / np.exp((mid - mid.max()) / temperature).sum())
        tail = verdict.bound / (verdict.bound + least * (1.0 - verdict.bound)) if verdict.bound else 0.0
    return replace(verdict, exact=False, bound=min(1.0, max(verdict.bound, float(tail)) + more))
