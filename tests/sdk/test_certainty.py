"""How far off a distribution can be when the shift is known within ends only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import ensemble
from uld_sdk.certainty import score_bounds, shifted_bound, tail_share, widened
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Verdict

TOP = TopLogprobs.build([0, 1, 2], np.log([0.5, 0.3, 0.1]))
SHIFT = np.array([0.0, -1.0, 0.5, 0.0])


def test_exact_shifts_leave_nothing_open() -> None:
    assert shifted_bound(TOP, (SHIFT, SHIFT), SHIFT, 0.0) == 0.0


def test_the_bound_holds_for_every_shift_between_the_ends() -> None:
    rng = np.random.default_rng(0)
    low, high = SHIFT - rng.random(4), SHIFT + rng.random(4)
    bound = shifted_bound(TOP, (low, high), SHIFT, 0.0)
    assert 0 < bound < 1

    def q(shift: np.ndarray) -> np.ndarray:
        weights = np.exp(TOP.logprobs + shift[TOP.ids])
        return weights / weights.sum()

    for _ in range(300):
        assert 0.5 * np.abs(q(low + rng.random(4) * (high - low)) - q(SHIFT)).sum() <= bound + 1e-9


@pytest.mark.parametrize("least", [-np.inf, -1.0])
@pytest.mark.parametrize("most", [1.0, np.inf])
def test_ends_that_nothing_bounds(least: float, most: float) -> None:
    """Of a pair a token's shift may be anything: the bound says so, without a warning of numpy's."""
    low, high = SHIFT.copy(), SHIFT.copy()
    low[1], high[1] = least, most
    bound = shifted_bound(TOP, (low, high), SHIFT, 0.0)
    assert 0 < bound <= 1
    if np.isinf(most):
        weights = np.exp(TOP.logprobs + SHIFT[:3])
        assert bound >= 1 - weights[1] / weights.sum() - 1e-6, "the token may take all"
    verdict = widened(Verdict((0, 2, 1), True, True, 0.0, False), TOP, (low, high), SHIFT, 0.0, Sampling())
    assert verdict.exact == (not np.isinf(most) and 0.3 * np.exp(most) <= 0.5)
    ends = score_bounds(1, float(TOP.logprobs[1]), TOP, (low, high), 0.0)
    assert ends[0] <= ends[1] <= 0.0


@given(seed=st.integers(0, 10_000), k=st.integers(1, 5), spread=st.sampled_from([0.05, 0.5, 3.0]), sampled=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_widened_verdict_holds_for_every_tail_and_every_shift(seed: int, k: int, spread: float, sampled: bool) -> None:
    """The truth has any shift between the ends, and any tail: neither its distribution nor its best token is farther than was said."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(7, 0.6)) + 1e-9
    log_p = np.log(p / p.sum())
    order = np.argsort(-log_p)
    top = TopLogprobs.build(order[:k], log_p[order[:k]])
    shift = rng.normal(size=7)
    low, high = shift - spread * rng.random(7), shift + spread * rng.random(7)
    low[order[k:]], high[order[k:]], shift[order[k:]] = -1.0, 1.0, 1.0  # of what was not reported the largest shift is taken
    q = ensemble(top, shift, 0.0)
    exact = q.beaten and not sampled
    verdict = Verdict(tuple(q.ids.tolist()), True, exact, 0.0 if exact else q.bound)
    told = widened(verdict, top, (low, high), shift, 0.0, Sampling(temperature=1.0) if sampled else Sampling())
    said = np.zeros(7)
    said[q.ids] = np.exp(q.logprobs)
    for _ in range(60):
        real = low + rng.integers(0, 2, 7) * (high - low) if rng.random() < 0.7 else low + rng.random(7) * (high - low)
        weights = np.exp(log_p + real)
        if told.exact:
            assert int(weights.argmax()) == told.token
        else:
            assert 0.5 * np.abs(weights / weights.sum() - said).sum() <= told.bound + 1e-9


@pytest.mark.parametrize("most", [0.0, 2.0])
def test_what_an_unreported_tail_may_weigh(most: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        p = rng.dirichlet(np.full(6, 0.5))
        shift = np.concatenate([np.zeros(3), rng.uniform(-8, most, 3)])
        weights = p * np.exp(shift)
        assert 0.5 * np.abs(weights / weights.sum() - p).sum() <= tail_share(float(p[3:].sum()), most) + 1e-12
    assert tail_share(0.1, 0.0) == pytest.approx(0.1)
