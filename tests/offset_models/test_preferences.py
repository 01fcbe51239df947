"""The objectives against their textbook forms: float64, one token at a time, probabilities where the formula has them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uld_adapters.errors import UnknownName, UsageError
from uld_offset_models.goal import FORGET, RETAIN, Goal, parse_goal
from uld_offset_models.preferences import answer_logprobs, dpo, forget_loss, ga, kl, nll, npo, retain_loss, token_logprobs

ROWS = (4, 1, 6, 3)  # tokens of each answer; for dpo the last two are the refusals of the first two
VOCABULARY, BETA = 11, 0.3


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are trained, the reference's logits, and labels."""
    maker = torch.Generator().manual_seed(seed)
    shape = (sum(ROWS), VOCABULARY)
    logits = torch.randn(shape, generator=maker).requires_grad_()
    return logits, torch.randn(shape, generator=maker), torch.randint(VOCABULARY, shape[:1], generator=maker)


def probability(logits: Tensor, label: int) -> Tensor:
    """exp(l_y) / sum_v exp(l_v)."""
    total = torch.zeros((), dtype=torch.float64)
    for value in logits:
        total = total + torch.exp(value)
    return torch.exp(logits[label]) / total


def answers(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """P(y|x) of each answer, as the product of its tokens' probabilities."""
    products, at = [], 0
    for count in ROWS:
        product = torch.ones((), dtype=torch.float64)
        for position in range(at, at + count):
            product = product * probability(logits[position], int(labels[position]))
        products.append(product)
        at += count
    return products


def slow_nll(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits, labels, strict=True):
        total = total - torch.log(probability(row, int(label)))
    return total / len(labels)


def slow_ga(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    return -slow_nll(logits, reference, labels)


def slow_npo(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """The form of the NPO paper: 2/beta E log(1 + (P/P_ref)^beta)."""
    total = torch.zeros((), dtype=torch.float64)
    for now, before in zip(answers(logits, labels), answers(reference, labels), strict=True):
        total = total + torch.log(1 + (now / before) ** BETA)
    return 2 / BETA * total / len(ROWS)


def slow_dpo(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """The form of the DPO paper, divided by beta: -E log sigma(beta log(..) - beta log(..))."""
    now, before = answers(logits, labels), answers(reference, labels)
    total = torch.zeros((), dtype=torch.float64)
    for lose, win in ((0, 2), (1, 3)):
        inside = BETA * torch.log(now[win] / before[win]) - BETA * torch.log(now[lose] / before[lose])
        total = total - torch.log(1 / (1 + torch.exp(-inside)))
    return total / 2 / BETA


def slow_kl(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for now, before in zip(logits, reference, strict=True):
        for value in range(VOCABULARY):
            p = probability(before, value)
            total = total + p * torch.log(p / probability(now, value))
    return total / len(logits)


def fast_forget(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        before = answer_logprobs(token_logprobs(reference, labels), ROWS)
        return forget_loss(name, token_logprobs(logits, labels), ROWS, before, beta=BETA)

    return loss


def fast_retain(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda logits, reference, labels: retain_loss(name, logits, labels, reference)


PAIRS = [
    (fast_forget("ga"), slow_ga),
    (fast_forget("npo"), slow_npo),
    (fast_forget("dpo"), slow_dpo),
    (fast_forget("relabel"), slow_nll),
    (fast_retain("gd"), slow_nll),
    (fast_retain("kl"), slow_kl),
]
NAMES = ["ga", "npo", "dpo", "relabel", "gd", "kl"]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("fast", "slow"), PAIRS, ids=NAMES)
def test_value_and_gradient_equal_the_textbook(fast: Callable[..., Tensor], slow: Callable[..., Tensor], seed: int) -> None:
    logits, reference, labels = inputs(seed)
    value = fast(logits, reference, labels)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, logits)
    exact = logits.detach().double().requires_grad_()
    expected = slow(exact, reference.double(), labels)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (gradient - expected_gradient).abs().max() < 1e-5
    assert expected_gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("fast", "slow"), PAIRS, ids=NAMES)
def test_a_constant_on_any_logits_changes_nothing(fast: Callable[..., Tensor], slow: Callable[..., Tensor]) -> None:
    logits, reference, labels = inputs()
    shift = torch.randn(len(labels), 1, generator=torch.Generator().manual_seed(1)) * 20
    assert fast(logits + shift, reference - shift, labels).item() == pytest.approx(fast(logits, reference, labels).item(), abs=1e-4)


def test_at_the_reference_kl_is_zero_and_the_preferences_are_undecided() -> None:
    logits, _, labels = inputs()
    whole = answer_logprobs(token_logprobs(logits, labels), ROWS)
    value = kl(logits, logits)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(value, logits, retain_graph=True)[0].abs().max() < 1e-6
    assert npo(whole, whole, beta=BETA).item() == pytest.approx(2 / BETA * math.log(2), abs=1e-5)
    assert dpo(whole, whole, whole, whole, beta=BETA).item() == pytest.approx(math.log(2) / BETA, abs=1e-5)


def test_a_small_beta_makes_npo_gradient_ascent_on_whole_answers() -> None:
    logits, reference, labels = inputs()
    whole, before = (answer_logprobs(token_logprobs(values, labels), ROWS) for values in (logits, reference))
    (gentle,) = torch.autograd.grad(npo(whole, before, beta=1e-4), logits, retain_graph=True)
    (ascent,) = torch.autograd.grad(whole.mean(), logits)
    assert torch.allclose(gentle, ascent, atol=1e-3)


def test_npo_lets_go_of_what_is_forgotten_where_ga_goes_on() -> None:
    forgotten = torch.tensor([-5000.0], requires_grad=True)
    value = npo(forgotten, torch.tensor([-10.0]), beta=0.1)
    assert torch.isfinite(value)
    assert torch.autograd.grad(value, forgotten)[0].item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(ga(forgotten), forgotten)[0].item() == 1


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_nothing_overflows(size: float) -> None:
    extreme = torch.tensor([size, size])
    nothing = torch.zeros(2)
    assert torch.isfinite(npo(extreme, nothing, beta=0.1))
    assert torch.isfinite(dpo(extreme, nothing, nothing, nothing, beta=0.1))
    logits = torch.tensor([[size, 0.0, -size]])
    assert torch.isfinite(kl(logits, -logits))
    assert torch.isfinite(nll(token_logprobs(logits, torch.tensor([1]))))


def test_no_gradient_reaches_the_reference() -> None:
    logits, reference, labels = inputs()
    reference.requires_grad_()
    total = sum(fast(logits, reference, labels) for fast, _ in PAIRS)
    total.backward()  # type: ignore[union-attr]
    assert reference.grad is None
    assert logits.grad is not None


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, reference, labels = inputs()
    assert token_logprobs(logits.bfloat16(), labels).dtype == torch.float32
    assert kl(logits.bfloat16(), reference.bfloat16()).dtype == torch.float32


def test_none_keeps_nothing_and_costs_nothing() -> None:
    logits, _, labels = inputs()
    assert retain_loss("none", logits, labels, None).item() == 0


def test_every_pair_can_be_written() -> None:
    for forget in FORGET:
        assert parse_goal(forget) == Goal(forget, "none")
        for retain in RETAIN:
            goal = parse_goal(f" {forget.upper()} + {retain} ")
            assert (goal, str(goal)) == (Goal(forget, retain), f"{forget}+{retain}")


@pytest.mark.parametrize(("text", "near"), [("nop+kl", "'npo'"), ("npo+kll", "'kl'"), ("relable", "'relabel'"), ("gga+gd", "'ga'")])
def test_a_misspelt_objective_is_answered_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UnknownName, match="objective") as caught:
        parse_goal(text)
    assert near in caught.value.hint


@pytest.mark.parametrize("text", ["", "npo+", "+kl", "npo+kl+gd", "kl+npo", "gd", "none"])
def test_what_is_no_pair_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_goal(text)
    assert "npo+kl" in caught.value.hint
