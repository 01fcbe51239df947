"""The losses against their textbook forms, with every logit stored."""

import math

import pytest
import torch
from torch import Tensor

from uld_offset_models import objectives
from uld_offset_models.objectives import linear_logsumexp, peak_excess, remember, uniform

POSITIONS, WIDTH, ROWS = 13, 8, 50


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", 5)
    monkeypatch.setattr(objectives, "_BLOCK", 7)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    maker = torch.Generator().manual_seed(0)
    scaled = torch.randn(POSITIONS, WIDTH, generator=maker, requires_grad=True)
    head = 2 * torch.randn(ROWS, WIDTH, generator=maker)
    return scaled, head, torch.randint(ROWS, (POSITIONS,), generator=maker)


def slow_remember(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over positions of -log softmax(l)_y."""
    total = torch.zeros(())
    for row, label in zip(logits, labels, strict=True):
        total = total - torch.log(torch.exp(row[label]) / torch.exp(row).sum())
    return total / len(logits)


def slow_uniform(logits: Tensor) -> Tensor:
    """The mean over positions of sum_v u log(u / p_v)."""
    total = torch.zeros(())
    for row in logits:
        p = torch.exp(row) / torch.exp(row).sum()
        total = total + (torch.log((1 / ROWS) / p) / ROWS).sum()
    return total / len(logits)


@pytest.mark.parametrize("which", ["remember", "uniform"])
def test_value_and_gradient_equal_the_textbook(which: str) -> None:
    scaled, head, labels = inputs()
    fast = remember(scaled, head, labels) if which == "remember" else uniform(scaled, head)
    (gradient,) = torch.autograd.grad(fast, scaled)
    logits = scaled.double() @ head.double().T
    slow = slow_remember(logits, labels) if which == "remember" else slow_uniform(logits)
    (reference,) = torch.autograd.grad(slow, scaled)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    assert torch.allclose(gradient, reference, atol=1e-5)


@pytest.mark.parametrize("which", ["remember", "uniform"])
def test_a_constant_on_the_logits_changes_nothing(which: str) -> None:
    """A direction in which every row of the head has the same value adds one constant to all logits of a position."""
    scaled, head, labels = inputs()
    widened = torch.cat([head, torch.ones(ROWS, 1)], 1)
    values = []
    for shift in (0.0, 7.0, -40.0):
        extended = torch.cat([scaled, torch.full((POSITIONS, 1), shift)], 1)
        values.append((remember(extended, widened, labels) if which == "remember" else uniform(extended, widened)).item())
    assert values == pytest.approx([values[0]] * 3, abs=1e-4)


def test_uniform_is_zero_for_equal_logits_and_remember_is_log_vocabulary() -> None:
    _, head, labels = inputs()
    nothing = torch.zeros(POSITIONS, WIDTH)
    assert uniform(nothing, head).item() == pytest.approx(0.0, abs=1e-6)
    assert remember(nothing, head, labels).item() == pytest.approx(math.log(ROWS), abs=1e-5)
    assert peak_excess(nothing, head).abs().max() < 1e-5


def test_no_overflow_for_large_logits() -> None:
    scaled, head, labels = inputs()
    assert torch.isfinite(remember(scaled * 1e4, head, labels))
    assert torch.isfinite(linear_logsumexp(scaled * 1e4, head)).all()


def test_peak_excess_is_the_largest_log_ratio() -> None:
    scaled, head, _ = inputs()
    expected = (torch.log_softmax(scaled @ head.T, -1) + math.log(ROWS)).amax(-1)
    assert torch.allclose(peak_excess(scaled, head), expected, atol=1e-5)
