"""The rule that stops by the hold-out, on shares that a script dictates, and the order of rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from uld_adapters.errors import UsageError
from uld_offset_models.encoding import Encoded
from uld_offset_models.holdout import Watch
from uld_offset_models.schedule import multiplier
from uld_offset_models.steps import Steps


class Scripted:
    """An assistant whose untouched shares are given: (forget, hold-out) for each check."""

    def __init__(self, shares: Sequence[tuple[float, float]]) -> None:
        self.answers = iter([share for pair in shares for share in pair])
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def untouched_share(self, rows: Any, *, margin: float) -> float:
        return next(self.answers)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight}


def run(shares: list[tuple[float, float]], bound: float | None) -> tuple[int, float]:
    """The check that stopped the run (or the last one), and the check whose weights were kept."""
    row = [Encoded((1, 2), 1)]
    assistant: Any = Scripted(shares)
    watch = Watch(row, row, 3.0, bound)
    at = 0
    for at in range(1, len(shares) + 1):
        with torch.no_grad():
            assistant.weight.fill_(at)
        watch.check(assistant, at)
        if watch.should_stop():
            break
    watch.settle(assistant)
    return at, assistant.weight.item()


def test_it_ends_when_the_share_falls_after_a_good_check_and_keeps_the_last_good_weights() -> None:
    spilling = [(1.0, 1.0), (0.5, 0.95), (0.0, 0.92), (0.0, 0.91), (0.0, 0.7), (0.0, 0.4)]
    assert run(spilling, 0.9) == (5, 4.0)
    assert run(spilling, None) == (6, 6.0)
    opening = [(1.0, 1.0), (0.4, 0.2), (0.0, 0.3), (0.0, 0.95), (0.0, 1.0), (0.02, 0.8), (0.0, 1.0)]
    assert run(opening, 0.9) == (6, 5.0)  # the dip while the forget set is learned, and spilling once it is, end nothing
    assert run([(0.0, 0.9), (0.0, 0.9)], 0.9) == (2, 2.0)  # at the bound is not under it


def test_a_bound_that_was_never_met_is_told() -> None:
    with pytest.warns(UserWarning, match=r"--stop-untouched 0\.9 was never met.*at the end 40%, and 0% of the forget answers"):
        assert run([(0.6, 0.5), (0.0, 0.4)], 0.9) == (2, 2.0)
    with pytest.warns(UserWarning, match="never met"):
        assert run([(0.6, 0.95), (0.3, 0.5)], 0.9) == (2, 2.0)  # so much was untouched before anything was learned


def test_checks_are_closer_where_they_can_stop_a_run() -> None:
    row = [Encoded((1, 2), 1)]
    assert [Watch(row, row, 3.0, bound).every(200) for bound in (None, 0.9)] == [40, 10]
    assert Watch(row, row, 3.0, 0.9).every(7) == 1


def test_every_row_is_seen_once_an_epoch_and_order_depends_on_the_seed_only() -> None:
    forget = [Encoded((1, i), 1) for i in range(10)]
    retain = [Encoded((2, i), 1) for i in range(7)]
    steps = Steps(forget, retain, batch=5, seed=4, first=0, last=6)
    labels = [steps[i].labels.tolist() for i in range(6)]
    assert sorted(labels[0][:5] + labels[1][:5]) == list(range(10))
    later = Steps(forget, retain, batch=5, seed=4, first=3, last=6)
    assert [later[i].labels.tolist() for i in range(len(later))] == labels[3:]
    assert Steps(forget, retain, batch=5, seed=5, first=0, last=6)[0].labels.tolist() != labels[0]


def test_processes_share_a_step() -> None:
    rows = [Encoded((1, *range(i + 2)), 1) for i in range(8)]
    whole = Steps(rows, rows, batch=4, seed=0, first=0, last=1)[0]
    parts = [Steps(rows, rows, batch=4, seed=0, first=0, last=1, rank=rank, world=2)[0] for rank in (0, 1)]
    assert [part.totals for part in parts] == [whole.totals] * 2
    assert sum(part.forget for part in parts) == whole.forget
    with pytest.raises(UsageError, match="processes"):
        Steps(rows, rows, batch=1, seed=0, first=0, last=1, world=2)


def test_schedules() -> None:
    assert [multiplier("constant", step, 4) for step in range(4)] == [1.0] * 4
    assert [multiplier("linear", step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert multiplier("cosine", 2, 4) == pytest.approx(0.5)
