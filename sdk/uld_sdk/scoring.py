"""Log-probability of a given text under the unlearned model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from uld_adapters.logprobs import Score, TopLogprobs
from uld_offset_models.several import JointRule
from uld_offset_models.shift import Ensemble, Rule, completed_ensemble, ensemble
from uld_sdk.certainty import score_bounds
from uld_sdk.result import ScoreResult
from uld_sdk.verify import is_touched


def score_continuation(score: Score, readings: Sequence[Any], rule: Rule | JointRule) -> ScoreResult:
    """Log q(y_i | x, y_<i) for each token, q as in generation: p_M where untouched, the ensemble on F elsewhere.

    `readings[i]` is the small model's reading at the prefix of token i. Where K is incomplete the normaliser lies between
    Z_K and Z_K + w, and a token outside K has at most p_k; both ends are returned, and under the tail policy `complete` the
    value with the estimated tail between them.
    """
    lower, upper, estimates, untouched = [], [], [], 0
    for token, value, top, reading in zip(score.tokens, score.logprobs, score.positions, readings, strict=True):
        if not is_touched(reading, rule):
            untouched += 1
            low, high = (-np.inf, top.ceiling) if np.isnan(value) else (float(value), float(value))
            estimate = high
        else:
            shift, ratio = rule.shift(reading), rule.ratio(reading)
            q = ensemble(top, shift, ratio)
            low, high = _bounds(token, float(value), top, q, shift, ratio)
            estimate = high
            if (ends := rule.bounds(reading)) is not None:
                low, high = score_bounds(token, float(value), top, ends, ratio)
                estimate = min(max(estimate, low), high)
            if q.tail and (frozen := rule.frozen(reading)) is not None:
                whole = completed_ensemble(top, frozen, shift, ratio)
                inside = np.flatnonzero(whole.ids == token)
                estimate = float(whole.logprobs[inside[0]]) if inside.size else -np.inf
                estimate = min(max(estimate, low), high)
        lower.append(low)
        upper.append(min(0.0, high))
        estimates.append(min(0.0, estimate))
    return ScoreResult(tuple(score.tokens), tuple(lower), tuple(upper), untouched, tuple(estimates))


def _bounds(token: int, value: float, top: TopLogprobs, q: Ensemble, shift: np.ndarray, ratio: float) -> tuple[float, float]:
    """Both ends of log q at a touched position; `value` is log p_M of the token in nats, NaN where it is not known."""
    kept = np.flatnonzero(q.ids == token)
    widest = float(np.logaddexp(q.log_normaliser, q.unseen))
    if kept.size:
        high = float(q.logprobs[kept[0]])
        return high + q.log_normaliser - widest, high
    if np.isnan(value) and q.tail:
        return -np.inf, top.ceiling + float(shift[token]) - q.log_normaliser
    if q.tail and value >= top.logprobs[0] + np.log(max(ratio, 1e-300)):
        weight = value + float(shift[token])  # inside F, though the server's top k does not reach it
        return weight - widest, weight - q.log_normaliser
    return -np.inf, -np.inf
