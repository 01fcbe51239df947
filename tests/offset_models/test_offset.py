"""The ensemble's objectives against their textbook forms: float64, one token at a time, probabilities where the formula has them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from uld_offset_models.assistant import Gate, load_base
from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import FORGET, RETAIN, parse_goal
from uld_offset_models.offset import OffsetPair, ensemble_logits
from uld_offset_models.offset_lessons import OffsetLessons
from uld_offset_models.packing import use_packed_attention
from uld_offset_models.preferences import answer_logprobs, forget_loss, retain_loss, token_logprobs
from uld_offset_models.steps import Steps
from uld_offset_models.target_logits import Support, TopRows, completed, truncated
from uld_offset_models.target_side import CachedTarget, LocalTarget
from uld_offset_models.tuned import Tuned, make_trainable

ROWS, VOCABULARY, BETA = (4, 1, 6, 3), 13, 0.3  # of dpo the last two rows are the refusals of the first two
SIZES = sum(ROWS)


@dataclass
class Asked:
    """What a cache holds of one answer."""

    ids: np.ndarray
    logprobs: np.ndarray
    label: np.ndarray
    tail: np.ndarray


def asked(log_p: np.ndarray, labels: np.ndarray, k: int, *, told: bool = True) -> Asked:
    """The top k of the target's distributions with the label's own value, as a server reports them."""
    order = np.argsort(-log_p, axis=-1)[:, :k]
    values = np.take_along_axis(log_p, order, -1)
    label = log_p[np.arange(len(labels)), labels]
    if not told:
        label = np.where((order == labels[:, None]).any(-1), label, np.nan)
    return Asked(order, values, label, 1 - np.exp(values).sum(-1))


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits of target, o' and o, and labels."""
    maker = torch.Generator().manual_seed(seed)
    target, tuned, frozen = (torch.randn(SIZES, VOCABULARY, generator=maker) * 1.5 for _ in range(3))
    return target, tuned.requires_grad_(), frozen, torch.randint(VOCABULARY, (SIZES,), generator=maker)


def slow_target(target: Tensor, frozen: Tensor, label: int, k: int, tail: str) -> dict[int, float]:
    """P_M of one position by the tail policy, token by token; what it leaves out cannot be."""
    p = (target.double().exp() / target.double().exp().sum()).tolist()
    o = (frozen.double().exp() / frozen.double().exp().sum()).tolist()
    known = {*sorted(range(VOCABULARY), key=lambda v: -p[v])[:k], label}
    if tail == "truncate":
        return {v: p[v] / sum(p[u] for u in known) for v in known}
    rest = [v for v in range(VOCABULARY) if v not in known]
    mass = 1 - sum(p[v] for v in known)
    return {v: p[v] if v in known else mass * o[v] / sum(o[u] for u in rest) for v in range(VOCABULARY)}


def slow_ensemble(p_m: dict[int, float], tuned: Tensor, frozen: Tensor, alpha: float, gate: Tensor) -> dict[int, Tensor]:
    """Q(v) = p_M(v) (p_o'(v) / p_o(v))^(alpha c) / Z."""
    new, old = (values.double().exp() / values.double().exp().sum() for values in (tuned, frozen))
    weights = {v: p * (new[v] / old[v]) ** (alpha * gate) for v, p in p_m.items()}
    total = sum(weights.values(), torch.zeros((), dtype=torch.float64))
    return {v: weight / total for v, weight in weights.items()}


def slow_losses(name: str, q: list[dict[int, Tensor]], p_m: list[dict[int, float]], labels: list[int]) -> Tensor:
    """One objective in plain words."""
    logs = [torch.log(here[label]) for here, label in zip(q, labels, strict=True)]
    refs = [math.log(here[label]) for here, label in zip(p_m, labels, strict=True)]
    ratios, at = [], 0
    for count in ROWS:
        ratios.append(sum(logs[at : at + count]) - sum(refs[at : at + count]))  # type: ignore[arg-type]
        at += count
    if name == "ga":
        return sum(logs) / len(logs)  # type: ignore[return-value]
    if name in ("relabel", "gd"):
        return -sum(logs) / len(logs)  # type: ignore[return-value]
    if name == "npo":
        return 2 / BETA * sum(torch.log(1 + torch.exp(BETA * ratio)) for ratio in ratios) / len(ratios)  # type: ignore[return-value]
    if name == "dpo":
        inside = [BETA * (ratios[2] - ratios[0]), BETA * (ratios[3] - ratios[1])]
        return -sum(torch.log(1 / (1 + torch.exp(-value))) for value in inside) / 2 / BETA  # type: ignore[return-value]
    parts = [p[v] * (math.log(p[v]) - torch.log(here[v])) for here, p in zip(q, p_m, strict=True) for v in p if p[v] > 0]
    return sum(parts) / len(labels)  # type: ignore[return-value]


def fast_support(target: Tensor, frozen: Tensor, labels: Tensor, k: int, tail: str) -> Support:
    known = TopRows.joined([asked(torch.log_softmax(target.double(), -1).numpy(), labels.numpy(), k)])
    return completed(known, labels, frozen) if tail == "complete" else truncated(known, labels)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
@pytest.mark.parametrize("tail", ["truncate", "complete"])
@pytest.mark.parametrize("name", ["ga", "npo", "dpo", "relabel", "gd", "kl"])
def test_value_and_gradient_of_each_objective_equal_the_textbook(name: str, tail: str, k: int) -> None:
    target, tuned, frozen, labels = inputs(k)
    gate = torch.rand(SIZES, 1, generator=torch.Generator().manual_seed(9)).requires_grad_()
    alpha = 0.8
    logits, ids, columns = fast_support(target, frozen, labels, k, tail)
    change = gate * (tuned - frozen)
    now = ensemble_logits(logits, change if ids is None else change.gather(-1, ids), alpha=alpha)
    before = answer_logprobs(token_logprobs(logits, columns), ROWS)
    if name in RETAIN:
        value = retain_loss(name, now, columns, logits)
    else:
        value = forget_loss(name, token_logprobs(now, columns), ROWS, before, beta=BETA)
    gradients = torch.autograd.grad(value, [tuned, gate])

    p_m = [slow_target(target[i], frozen[i], int(labels[i]), k, tail) for i in range(SIZES)]
    exact, open_ = tuned.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    q = [slow_ensemble(p_m[i], exact[i], frozen[i], alpha, open_[i, 0]) for i in range(SIZES)]
    expected = slow_losses(name, q, p_m, labels.tolist())
    expected_gradients = torch.autograd.grad(expected, [exact, open_])
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert (mine - theirs).abs().max() < 1e-5
    if k > 1 or tail == "complete":
        assert expected_gradients[0].abs().max() > 1e-3


@given(seed=st.integers(0, 1000), k=st.integers(1, VOCABULARY), tail=st.sampled_from(["truncate", "complete"]), alpha=st.floats(0.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_equal_models_leave_the_target_as_it_is(seed: int, k: int, tail: str, alpha: float) -> None:
    target, _, frozen, labels = inputs(seed)
    logits, _, columns = fast_support(target, frozen, labels, k, tail)
    now = torch.softmax(ensemble_logits(logits, torch.zeros_like(logits), alpha=alpha), -1)
    p_m = torch.softmax(target, -1)
    order = target.argsort(-1, descending=True)[:, :k]
    if tail == "complete":
        assert torch.allclose(now.gather(-1, order), p_m.gather(-1, order), atol=1e-5)
        label = now.gather(-1, columns.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(label, p_m.gather(-1, labels.unsqueeze(-1)).squeeze(-1), atol=1e-5)
    else:
        label = p_m.gather(-1, labels.unsqueeze(-1))
        outside = (order != labels.unsqueeze(-1)).float()
        kept = torch.cat([label, p_m.gather(-1, order) * outside], -1)
        assert torch.allclose(now, kept / kept.sum(-1, keepdim=True), atol=1e-5)


def test_nothing_depends_on_a_constant_added_to_any_logits() -> None:
    target, tuned, frozen, labels = inputs(3)
    shift = torch.randn(SIZES, 1, generator=torch.Generator().manual_seed(1)) * 20
    for tail in ("truncate", "complete"):
        values = []
        for moved in (torch.zeros(SIZES, 1), shift):
            logits, ids, columns = fast_support(target + moved, frozen - moved, labels, 3, tail)
            change = tuned + 2 * moved - (frozen - moved)
            now = ensemble_logits(logits, change if ids is None else change.gather(-1, ids), alpha=0.7)
            before = answer_logprobs(token_logprobs(logits, columns), ROWS)
            values.append(forget_loss("npo", token_logprobs(now, columns), ROWS, before, beta=BETA).item())
            values.append(retain_loss("kl", now, columns, logits).item())
        assert values[:2] == pytest.approx(values[2:], abs=1e-4)


def test_a_label_that_the_server_would_not_tell_is_part_of_the_tail() -> None:
    target, _, frozen, labels = inputs(5)
    log_p = torch.log_softmax(target.double(), -1).numpy()
    known = TopRows.joined([asked(log_p, labels.numpy(), 2, told=False)])
    assert known.label.isnan().any()
    whole = torch.softmax(completed(known, labels, frozen).logits, -1)
    for i in range(SIZES):
        top = log_p[i].argsort()[::-1][:2]
        rest = [v for v in range(VOCABULARY) if v not in top]
        share = torch.softmax(frozen[i][rest], -1) * (1 - np.exp(log_p[i][top]).sum())
        assert torch.allclose(whole[i][rest], share.float(), atol=1e-5)
    cut = truncated(known, labels).logits
    assert torch.isfinite(cut).all()
    assert (cut[:, 0] <= known.logprobs.amin(-1) + 1e-6)[known.label.isnan()].all()


def test_reports_of_unequal_length_are_laid_end_to_end() -> None:
    target, _, frozen, labels = inputs(6)
    log_p = torch.log_softmax(target.double(), -1).numpy()
    parts = [asked(log_p[:5], labels[:5].numpy(), 2), asked(log_p[5:], labels[5:].numpy(), 4)]
    both = TopRows.joined(parts)
    alone = [TopRows.joined([part]) for part in parts]
    pieces = (slice(0, 5), slice(5, None))
    for make in (lambda k, la, fr: completed(k, la, fr), lambda k, la, fr: truncated(k, la)):
        whole = make(both, labels, frozen)
        for known, piece in zip(alone, pieces, strict=True):
            mine = make(known, labels[piece], frozen[piece])
            old, new = (
                torch.log_softmax(s.logits, -1).gather(-1, s.labels.unsqueeze(-1))
                for s in (mine, Support(whole.logits[piece], None, whole.labels[piece]))
            )
            assert torch.allclose(old, new, atol=1e-6)


# The module: packed rows against rows that transformers runs alone.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small model and the target, of one tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    return tiny.tiny_model(root / "small", hidden=32), tiny.tiny_model(root / "target", hidden=48, seed=5, scale=8.0)


def made_rows() -> tuple[list[Encoded], list[Encoded], dict[Encoded, Encoded]]:
    maker = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 300, (count,), generator=maker).tolist())

    begin = ids(10)  # long enough to be stored once in a pack
    prompts = [(*begin, *ids(count)) for count in (3, 1, 7, 2, 4)]
    rows = [Encoded((*prompt, *ids(count)), len(prompt)) for prompt, count in zip(prompts, (5, 9, 2, 3, 6), strict=True)]
    refusals = {row: Encoded((*row.ids[: row.start], *ids(4)), row.start) for row in rows[:3]}
    return rows[:3], rows[3:], refusals


class Built:
    """A pair over a real small model, and everything that the slow version needs of it."""

    def __init__(self, folders: tuple[Path, Path], objective: str, trainable: str, source: str, *, gated: bool, k: int = 7) -> None:
        from transformers import AutoModelForCausalLM

        small, target = folders
        self.objective, self.k, self.tail = objective, k, source
        self.forget, self.retain, self.refusals = made_rows()
        rows = [*self.forget, *self.retain, *self.refusals.values()]
        self.frozen = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager").requires_grad_(False)
        self.target = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").requires_grad_(False)
        base, tokenizer = load_base(small)
        states = Tuned(base, tokenizer, trainable="full", autocast=False).states(rows)
        theirs, _ = load_base(target)
        whole = Tuned(theirs, tokenizer, trainable="full", autocast=False)
        side: Any = LocalTarget(whole.states(rows), whole.head)
        if source != "local":
            side = CachedTarget(self.find, tail=source, vocabulary=len(tokenizer))
        gate = Gate(base.config.hidden_size, bias=0.0) if gated else None
        model = make_trainable(base, trainable=trainable, rank=4, lora_alpha=4, virtual_tokens=3, seed=0)
        self.pair = OffsetPair(
            model, tokenizer, goal=parse_goal(objective), beta=BETA, alpha=0.7, gate=gate, target=side, states=states,
            trainable=trainable, autocast=False,
        )  # fmt: skip
        maker = torch.Generator().manual_seed(1)
        with torch.no_grad():  # as if it had been trained for a while
            for parameter in self.pair.trained().values():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=maker))

    def find(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Asked:
        return asked(alone(self.target, Encoded((*prompt, *answer), len(prompt))).numpy(), np.array(answer), self.k)

    def lessons(self, **more: Any) -> OffsetLessons:
        kept = self.retain if not self.objective.endswith("none") else []
        steps = Steps(self.forget, kept, batch=3, seed=0, first=0, last=2, **more)
        return OffsetLessons(steps, parse_goal(self.objective), self.refusals, self.pair.target, self.pair.frozen_states)

    def log_q(self, row: Encoded) -> tuple[Tensor, Tensor]:
        """Log q and log p_M over the vocabulary at each answer position, of a row alone, by the tail policy."""
        p, o = alone(self.target, row), alone(self.frozen, row)
        embedded, out = tuned_alone(self.pair, row)
        if self.tail != "local":
            labels = torch.tensor(row.ids[row.start :])
            known = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.argsort(-1, descending=True)[:, : self.k], True)
            known |= torch.nn.functional.one_hot(labels, p.shape[-1]).bool()
            unseen = torch.log_softmax(o.masked_fill(known, -torch.inf), -1) + (p.exp() * ~known).sum(-1, keepdim=True).log()
            p = torch.where(known, p, unseen if self.tail == "complete" else torch.full_like(p, -1e4))
            p = torch.log_softmax(p, -1)
        gate: Any = 1.0 if self.pair.gate is None else self.pair.gate(embedded).double().unsqueeze(-1)
        return torch.log_softmax(p + 0.7 * gate * (out - o), -1), p

    def slow(self) -> tuple[Tensor, Tensor]:
        """Both losses from rows that are run alone."""
        aim, keep = self.objective.split("+")
        idle = [self.refusals[row] for row in self.forget]

        def tokens(row: Encoded) -> tuple[Tensor, Tensor]:
            at = torch.tensor(row.ids[row.start :]).unsqueeze(-1)
            now, before = self.log_q(row)
            return now.gather(-1, at).squeeze(-1), before.gather(-1, at).squeeze(-1)

        def ratio(row: Encoded) -> Tensor:
            now, before = tokens(row)
            return now.sum() - before.sum()

        losses = {
            "ga": lambda: torch.cat([tokens(row)[0] for row in self.forget]).mean(),
            "npo": lambda: torch.stack([torch.log(1 + torch.exp(BETA * ratio(row))) for row in self.forget]).mean() * 2 / BETA,
            "dpo": lambda: (
                torch.stack(
                    [torch.log(1 + torch.exp(BETA * (ratio(row) - ratio(no)))) for row, no in zip(self.forget, idle, strict=True)]
                ).mean()
                / BETA
            ),
            "relabel": lambda: -torch.cat([tokens(row)[0] for row in idle]).mean(),
        }
        keeps = {
            "none": lambda: torch.zeros((), dtype=torch.float64),
            "gd": lambda: -torch.cat([tokens(row)[0] for row in self.retain]).mean(),
            "kl": lambda: torch.cat([(p.exp() * (p - q)).sum(-1) for q, p in map(self.log_q, self.retain)]).mean(),
        }
        return losses[aim](), keeps[keep]()


def alone(model: Any, row: Encoded) -> Tensor:
    """Log-probabilities over the vocabulary at each answer position, by a pass of the row alone."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


def tuned_alone(pair: OffsetPair, row: Encoded) -> tuple[Tensor, Tensor]:
    """Final hidden states and log-probabilities of o', by peft's own pass of the row alone."""
    pair.inner.set_attn_implementation("eager")
    out = pair.model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
    use_packed_attention(pair.inner)
    count = len(row.ids) - row.start
    return out.hidden_states[-1][0, -count - 1 : -1], torch.log_softmax(out.logits[0, -count - 1 : -1].double(), -1)


CASES = [
    *[(f"{forget}+{retain}", "lora", "complete") for forget in FORGET for retain in RETAIN],
    *[(objective, "lora", "truncate") for objective in ("npo+kl", "dpo+gd", "relabel+kl")],
    *[(objective, "lora", "local") for objective in ("npo+kl", "ga+gd")],
    *[("npo+kl", trainable, tail) for trainable in ("full", "p-adapter") for tail in ("complete", "truncate")],
]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("objective", "trainable", "source"), CASES)
def test_a_step_equals_the_rows_alone(folders: tuple[Path, Path], objective: str, trainable: str, source: str, gated: bool) -> None:
    built = Built(folders, objective, trainable, source, gated=gated)
    losses = built.pair(built.lessons()[0])
    parameters = built.pair.trained()
    gradients = torch.autograd.grad(losses.forget + 0.5 * losses.retain, list(parameters.values()), allow_unused=True)
    forget, retain = built.slow()
    expected = torch.autograd.grad(forget + 0.5 * retain, list(parameters.values()), allow_unused=True)
    assert losses.forget.item() == pytest.approx(forget.item(), abs=1e-4, rel=1e-5)
    assert losses.retain.item() == pytest.approx(retain.item(), abs=1e-4, rel=1e-5)
    assert forget.abs() > 1e-3
    for (name, parameter), mine, theirs in zip(parameters.items(), gradients, expected, strict=True):
        if theirs is None:
            assert mine is None or not mine.any(), name
            continue
        assert mine is not None, name
        assert torch.allclose(mine, theirs.to(parameter.dtype), atol=2e-4, rtol=1e-3), name


@pytest.mark.parametrize("objective", ["npo+kl", "dpo+gd", "relabel+kl"])
def test_two_processes_share_one_step(folders: tuple[Path, Path], objective: str) -> None:
    built = Built(folders, objective, "lora", "complete", gated=True)
    whole = built.pair(built.lessons()[1])
    parts = [built.pair(built.lessons(rank=rank, world=2)[1]) for rank in (0, 1)]
    for name in ("forget", "retain"):
        assert sum(getattr(part, name) for part in parts).item() == pytest.approx(getattr(whole, name).item(), abs=1e-5)


def test_a_shut_gate_is_an_exact_no_op(folders: tuple[Path, Path]) -> None:
    built = Built(folders, "npo+kl", "lora", "complete", gated=True)
    assert built.pair.gate is not None
    with torch.no_grad():
        built.pair.gate.weight.zero_()
        built.pair.gate.bias.fill_(-200.0)
    losses = built.pair(built.lessons()[0])
    assert losses.forget.item() == pytest.approx(2 / BETA * math.log(2), abs=1e-5)
    assert losses.retain.item() == pytest.approx(0, abs=1e-6)
    hidden = built.pair.hidden(built.lessons()[0].pack)
    assert not built.pair.change(hidden, hidden * 2).any()
    assert built.pair.untouched_share(built.forget, margin=0.0) == 1.0


def test_an_untrained_adapter_changes_nothing_and_untouched_shares_are_counted_by_answers(folders: tuple[Path, Path]) -> None:
    built = Built(folders, "npo+kl", "lora", "complete", gated=False)
    moved = {row: max((tuned_alone(built.pair, row)[1] - alone(built.frozen, row)).abs().amax(-1).tolist()) for row in built.forget}
    least, middle, most = sorted(moved.values())
    for margin, share in ((least / 2, 0.0), ((least + middle) / 2, 1 / 3), ((middle + most) / 2, 2 / 3), (most + 0.01, 1.0)):
        assert built.pair.untouched_share(built.forget, margin=margin) == pytest.approx(share)
    with torch.no_grad():
        for name, parameter in built.pair.trained().items():
            if "lora_B" in name:
                parameter.zero_()
    assert built.pair.untouched_share(built.forget, margin=1e-3) == 1.0
