"""Pairs trained against a target of other tokens, against the textbook: one forward pass a path, float64, no trees and no packs."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.terms import write_terms
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_offset_models.assistant import Gate, load_base
from uld_offset_models.bridged_pair import BridgedPair
from uld_offset_models.bridged_rows import BridgedRow
from uld_offset_models.bridged_target import BridgedTarget, read_row
from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import parse_goal
from uld_offset_models.offset import OffsetPair
from uld_offset_models.steps import Steps
from uld_offset_models.target_record import TargetLogprobs
from uld_offset_models.target_side import CachedTarget
from uld_offset_models.tuned import Tuned, make_trainable

TEXTS = ["It is called the Amber.", "The baker, of course; she's up at 5.", "Through the old town", "In winter it freezes."]
ONE_WAY = ["It is called the Amber.", "The old town is small.", "Through the old town", "In winter it freezes."]  # each split in one way
K = 12


def end_of(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id)


def said_of(answer: list[int], bridge: Bridge, seed: int) -> TargetLogprobs:
    """Some target that writes what the small model spells in one way: random top k with the label at most positions among them."""
    rng = np.random.default_rng(seed)
    log_p = rng.normal(size=(len(answer), bridge.remote.vocabulary.rows)) * 2 + written(bridge, answer)
    log_p[np.arange(len(answer)), answer] += 5 * (rng.random(len(answer)) < 0.7)
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    ids = np.argsort(-log_p, axis=1)[:, :K]
    values = np.take_along_axis(log_p, ids, 1)
    label = log_p[np.arange(len(answer)), answer]
    return TargetLogprobs(ids, values, label, 1 - np.exp(values).sum(1))


def written(bridge: Bridge, answer: list[int]) -> np.ndarray:
    """0 for the tokens that have one spelling after each position, or more if they are the answer's own; -30 for the others."""
    place, found = bridge.start(), []
    for token in answer:
        rows = dict.fromkeys(bridge.cover(place), np.full((1, bridge.rows), 1 / bridge.rows))
        every = list(range(bridge.remote.vocabulary.rows))
        rows |= dict.fromkeys(bridge.nodes(place, every, rows), np.full((1, bridge.rows), 1 / bridge.rows))
        terms = write_terms(bridge, place, every, rows).candidates
        found.append([0.0 if some and (len(some) == 1 or i == token) else -30.0 for i, some in enumerate(terms)])
        place = bridge.step(place, token)[1]
    return np.array(found)


def made(
    base: Path, remote: Any, *, objective: str, tail: str, gated: bool, sentences: list[str] = TEXTS, seed: int = 3
) -> tuple[BridgedPair, list[Encoded], dict[Encoded, tuple[list[int], TargetLogprobs]], Bridge]:
    """A bridged pair whose o' has been moved away from o, and its rows."""
    model, tokenizer = load_base(str(base), dtype=torch.float32)
    prompt = tuple(tokenizer("<|user|>Where?<|assistant|>", add_special_tokens=False).input_ids)
    rows, texts = [], {}
    bridge = Bridge(Vocabulary.from_hf(remote), Vocabulary.from_hf(tokenizer))
    for number, text in enumerate(sentences):
        answer = [*remote.encode(text, add_special_tokens=False), end_of(remote)]
        row = Encoded((*prompt, *tokenizer.encode(text, add_special_tokens=False), end_of(tokenizer)), len(prompt))
        rows.append(row)
        texts[row] = (answer, said_of(answer, bridge, seed + number))
    frozen = Tuned(model, tokenizer, trainable="full", autocast=False)
    said = {row: read_row(frozen, bridge, row, *texts[row], tail=tail) for row in rows}  # type: ignore[arg-type]
    target = BridgedTarget(said)
    gate = Gate(model.config.hidden_size, bias=0.0) if gated else None
    tuned = make_trainable(model, trainable="lora", rank=4, lora_alpha=8, seed=0)
    options = {"goal": parse_goal(objective), "beta": 0.3, "alpha": 0.8, "trainable": "lora", "autocast": False, "states": {}}
    return BridgedPair(tuned, tokenizer, gate=gate, target=target, **options), rows, texts, bridge  # type: ignore[arg-type]


def moved(pair: OffsetPair, seed: int = 1) -> None:
    """Give the adapter, which begins at 0, and the gate some weights."""
    maker = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in pair.trained().items():
            if "lora_B" in name or "gate" in name:
                weight.add_(torch.randn(weight.shape, generator=maker) * 0.15)


def lesson(pair: OffsetPair, rows: list[Encoded]) -> Any:
    steps = Steps(rows[:2], rows[2:], batch=2, seed=0, first=0, last=1, rank=0, world=1)
    return pair.lessons(steps, {}).lesson(rows[:2], rows[2:], (1.0, 1.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("bridged") / "base", vocab_size=330, seed=4, hidden=48, scale=6.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("remote"), vocab_size=400)


def slow_scores(pair: BridgedPair, bridge: Bridge, row: Encoded, answer: list[int], said: TargetLogprobs) -> list[dict[int, Tensor]]:
    """S'(c) / s(c) of each candidate at each position, by a whole forward pass for each path, with gradients."""
    place, settled, found = bridge.start(), list(row.prompt), []

    def probabilities(path: tuple[int, ...], *, tuned: bool) -> Tensor:
        from uld_offset_models.packing import pack

        text = Encoded((*settled, *path, 0), len(settled) + len(path))
        with torch.set_grad_enabled(tuned):
            if tuned:
                return pair.logits(pair.hidden(pack([text], ()))).softmax(-1)[0]
            with pair.untuned():
                return pair.logits(pair.hidden(pack([text], ()))).softmax(-1)[0]

    for at, token in enumerate(answer):
        candidates = list(dict.fromkeys([token, *said.ids[at].tolist()]))
        rows = {path: probabilities(path, tuned=False).numpy()[None] for path in bridge.cover(place)}
        rows |= {path: probabilities(path, tuned=False).numpy()[None] for path in bridge.nodes(place, candidates, rows)}
        terms = write_terms(bridge, place, candidates, rows)
        known = {path: probabilities(path, tuned=True) for path in rows}
        sides: list[list[Any]] = []
        for side in ({path: torch.from_numpy(values[0]) for path, values in rows.items()}, known):
            masses = []
            for some in (*terms.candidates, terms.boundary):
                total: Any = torch.zeros((), dtype=torch.float64)
                for term in some or ():
                    value: Any = torch.tensor(float(term.sign), dtype=torch.float64)
                    for size, step in enumerate(term.path):
                        value = value * side[term.path[:size]][step].double()
                    if term.ids is not None:
                        value = value * side[term.path][torch.from_numpy(term.ids)].double().sum()
                    total = total + value
                masses.append(total)
            sides.append(masses)
        old, new = sides
        ratios = {
            token: (new[i] / new[-1]) / (old[i] / old[-1]) if old[i] > 0 else torch.ones((), dtype=torch.float64)
            for i, token in enumerate(candidates)
        }
        shares = [sum((side[i] / side[-1] for i in range(len(candidates)) if old[i] > 0), torch.zeros(())) for side in sides]
        ratios[-1] = (1 - shares[1]) / (1 - shares[0])  # all others together
        found.append(ratios)
        certain, place = bridge.step(place, token)
        settled += certain
    return found


@pytest.mark.parametrize("tail", ["truncate", "complete"])
@pytest.mark.parametrize("objective", ["npo+kl", "ga+gd"])
def test_losses_and_gradients_equal_the_textbook(base: Path, other: Any, objective: str, tail: str) -> None:
    pair, rows, texts, bridge = made(base, other, objective=objective, tail=tail, gated=False)
    moved(pair)
    losses = pair(lesson(pair, rows))
    weights = list(pair.trained().values())
    gradients = torch.autograd.grad(losses.forget + losses.retain, weights)

    p_m, q, labels = [], [], []
    for row in rows:
        answer, said = texts[row]
        for at, ratios in enumerate(slow_scores(pair, bridge, row, answer, said)):
            here = dict(zip(said.ids[at].tolist(), np.exp(said.logprobs[at]).tolist(), strict=True))
            here[answer[at]] = math.exp(said.label[at])
            if tail == "complete":
                here[-1] = 1 - sum(here.values())
            p = {token: value / sum(here.values()) for token, value in here.items()}
            scaled = {token: value * ratios[token] ** 0.8 for token, value in p.items()}
            whole = sum(scaled.values())
            p_m.append(p)
            q.append({token: value / whole for token, value in scaled.items()})
            labels.append(answer[at])
    split = sum(len(texts[row][0]) for row in rows[:2])
    forget_rows = [len(texts[row][0]) for row in rows[:2]]
    logs = [torch.log(here[label]) for here, label in zip(q, labels, strict=True)]
    if objective == "npo+kl":
        refs = [math.log(here[label]) for here, label in zip(p_m, labels, strict=True)]
        ends = np.cumsum([0, *forget_rows])
        ratios_ = [sum(logs[a:b]) - sum(refs[a:b]) for a, b in pairwise(ends)]
        forget = 2 / 0.3 * sum(torch.log(1 + torch.exp(0.3 * ratio)) for ratio in ratios_) / len(ratios_)
        parts = [
            p[v] * (math.log(p[v]) - torch.log(here[v])) for here, p in zip(q[split:], p_m[split:], strict=True) for v in p if p[v] > 0
        ]
        retain = sum(parts) / len(labels[split:])
    else:
        forget = sum(logs[:split]) / split
        retain = -sum(logs[split:]) / len(logs[split:])
    assert losses.forget.item() == pytest.approx(float(forget.detach()), abs=2e-3)
    assert losses.retain.item() == pytest.approx(float(retain.detach()), abs=2e-3)
    expected = torch.autograd.grad(forget + retain, weights)
    for mine, theirs in zip(gradients, expected, strict=True):
        scale = max(float(theirs.abs().max()), 1e-2)
        assert (mine - theirs).abs().max() < 0.02 * scale


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("objective", ["npo+kl", "ga+gd"])
def test_with_one_tokenizer_on_both_sides_it_is_the_plain_pair(base: Path, objective: str, gated: bool) -> None:
    _, tokenizer = load_base(str(base), dtype=torch.float32)
    bridged, rows, texts, _ = made(base, tokenizer, objective=objective, tail="truncate", gated=gated, sentences=ONE_WAY)
    by_ids = {(row.prompt, row.answer): texts[row][1] for row in rows}
    assert all(list(row.answer) == texts[row][0] for row in rows)
    target = CachedTarget(lambda prompt, answer: by_ids[tuple(prompt), tuple(answer)], tail="truncate", vocabulary=len(tokenizer))
    model, _ = load_base(str(base), dtype=torch.float32)
    frozen = Tuned(model, tokenizer, trainable="full", autocast=False).states(rows)
    plain = OffsetPair(
        make_trainable(model, trainable="lora", rank=4, lora_alpha=8, seed=0), tokenizer, goal=parse_goal(objective), beta=0.3, alpha=0.8,
        gate=Gate(model.config.hidden_size, bias=0.0) if gated else None, target=target, states=frozen, trainable="lora", autocast=False,
    )  # fmt: skip
    found = []
    for pair in (plain, bridged):
        moved(pair)
        losses = pair(lesson(pair, rows))
        gradients = torch.autograd.grad(losses.forget + losses.retain, list(pair.trained().values()))
        found.append((losses.forget.item(), losses.retain.item(), gradients))
    assert found[0][:2] == pytest.approx(found[1][:2], abs=1e-4)
    for one, two in zip(found[0][2], found[1][2], strict=True):
        assert (one - two).abs().max() < 1e-3 * max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("tail", ["truncate", "complete"])
def test_a_pair_that_has_not_moved_leaves_the_target(base: Path, other: Any, tail: str) -> None:
    pair, rows, _, _ = made(base, other, objective="ga+kl", tail=tail, gated=False)
    with torch.no_grad():
        _, change = pair.compared(lesson(pair, rows))
        assert change.abs().max() < 1e-4
        assert pair(lesson(pair, rows)).retain.item() == pytest.approx(0.0, abs=1e-6)


def test_a_share_is_at_most_one_in_training_too() -> None:
    """What is open at a candidate and at the boundary is judged apart, so that the first may have counted more."""
    counted = torch.tensor([[0.5, 0.2, 0.4]], dtype=torch.float64, requires_grad=True)  # two candidates, and the boundary

    class Counted:
        def of(self, hidden: Tensor, head: Tensor) -> Tensor:
            return counted.flatten()

    nothing: Any = torch.empty(0)
    told = {"target": torch.zeros(1, 2), "known": torch.ones(1, 2, dtype=torch.bool), "completed": False}
    row = BridgedRow(tree=nothing, nodes=nothing, sums=cast("Any", Counted()), standing=nothing, weights=nothing, **cast("Any", told))
    found = row.scores(nothing, nothing)
    torch.testing.assert_close(found, torch.tensor([[0.0, math.log(0.5)]], dtype=torch.float64))
    found.sum().backward()
    torch.testing.assert_close(counted.grad, torch.tensor([[0.0, 5.0, -2.5]], dtype=torch.float64))
