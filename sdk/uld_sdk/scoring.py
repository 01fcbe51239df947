"""Log-probability of a given text under the unlearned model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from uld_adapters.logprobs import Score
from uld_offset_models.several import JointRule
from uld_offset_models.shift import Rule, ensemble
from uld_sdk.result import ScoreResult
from uld_sdk.verify import is_touched


def score_continuation(score: Score, readings: Sequence[Any], rule: Rule | JointRule) -> ScoreResult:
    """Log q(y_i | x, y_<i) for each token, q as in generation: p_M where untouched, the ensemble on F elsewhere.

    `readings[i]` is the small model's reading at the prefix of token i. Where K is incomplete the normaliser lies between
    Z_K and Z_K + w, and a token outside K has at most p_k; both ends are returned.
    """
    lower, upper, untouched = [], [], 0
    for token, value, top, reading in zip(score.tokens, score.logprobs, score.positions, readings, strict=True):
        last = float(top.logprobs[-1])
        if not is_touched(reading, rule):
            untouched += 1
            low, high = (-np.inf, last) if np.isnan(value) else (float(value), float(value))
        else:
            shift, ratio = rule.shift(reading), rule.ratio(reading)
            q = ensemble(top, shift, ratio)
            kept = np.flatnonzero(q.ids == token)
            widest = float(np.logaddexp(q.log_normaliser, np.log(q.unseen))) if q.unseen else q.log_normaliser
            if kept.size:
                high = float(q.logprobs[kept[0]])
                low = high + q.log_normaliser - widest
            elif not np.isnan(value) and q.unseen and value >= top.logprobs[0] + np.log(max(ratio, 1e-300)):
                weight = float(value) + float(shift[token])  # inside F, though the server's top k does not reach it
                low, high = weight - widest, weight - q.log_normaliser
            elif np.isnan(value) and q.unseen:
                low, high = -np.inf, last + float(shift[token]) - q.log_normaliser
            else:
                low = high = -np.inf
        lower.append(low)
        upper.append(min(0.0, high))
    return ScoreResult(tuple(score.tokens), tuple(lower), tuple(upper), untouched)
