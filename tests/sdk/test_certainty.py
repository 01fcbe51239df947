"""How far off a distribution can be when the shift is known within ends only."""

import numpy as np
import pytest

from uld_adapters.logprobs import TopLogprobs
from uld_sdk.certainty import score_bounds, shifted_bound, widened
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
