"""The score of a given text against plain enumeration of the vocabulary."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toy import ROWS, Thought, table
from uld_adapters.logprobs import Score, TopLogprobs
from uld_offset_models.shift import Rule, uld_shift
from uld_sdk.scoring import score_continuation


def truth(log_p: np.ndarray, excess: np.ndarray, rule: Rule) -> np.ndarray:
    """Log q over the whole vocabulary, in plain words."""
    if rule.margin and excess.max() <= rule.margin:
        return log_p
    log_q = log_p + uld_shift(excess, rule)
    log_q[log_p < log_p.max() + math.log(rule.filter)] = -np.inf
    return log_q - np.logaddexp.reduce(log_q)


@pytest.mark.parametrize("told", [True, False], ids=["the server says the token's own value", "only its top k"])
@pytest.mark.parametrize("nameless", [False, True], ids=["all told apart", "the second best is not"])
@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS), margin=st.sampled_from([0.0, 1.0, 3.0]), scale=st.floats(0.5, 4.0))
@settings(max_examples=300, deadline=None)
def test_the_true_value_lies_between_the_bounds(nameless: bool, told: bool, seed: int, k: int, margin: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rule = Rule(alpha=0.75, margin=margin, filter=0.01)
    log_p, log_a = table(seed, scale), table(seed + 1, scale)
    tokens = tuple(int(t) for t in rng.integers(0, ROWS, 4))
    positions, values, exact, touched = [], [], [], 0
    for at, token in enumerate(tokens):
        row, excess = log_p[at], log_a[at] + math.log(ROWS)
        order = np.argsort(-row, kind="stable")[:k]
        hidden, order = (order[1:2], np.delete(order, slice(1, 2))) if nameless else (order[:0], order)
        positions.append(TopLogprobs.build(order, row[order], complete=k == ROWS and not nameless, neutral=row[hidden].tolist()))
        values.append(row[token] if told or token in order else np.nan)
        exact.append(truth(row, excess, rule)[token])
        touched += not margin or excess.max() > margin
    found = score_continuation(
        Score(tokens, np.array(values), tuple(positions)), [Thought(log_a[at] + math.log(ROWS)) for at in range(4)], rule
    )
    assert found.untouched == 4 - touched
    for low, high, value in zip(found.lower, found.upper, exact, strict=True):
        assert low - 1e-9 <= value <= high + 1e-9
    if k == ROWS and not nameless:
        np.testing.assert_allclose(found.lower, exact, atol=1e-9)
        np.testing.assert_allclose(found.upper, exact, atol=1e-9)
