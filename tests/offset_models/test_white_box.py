"""The white box in training against the same model run row by row by transformers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from uld_adapters.errors import DataError
from uld_offset_models.assistant import load_base
from uld_offset_models.data import Example
from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import FORGET, RETAIN, parse_goal
from uld_offset_models.lessons import Lessons, Reference
from uld_offset_models.packing import use_packed_attention
from uld_offset_models.refusals import BUILT_IN, read_refusals, refused
from uld_offset_models.steps import Steps
from uld_offset_models.white_box import WhiteBox, build_white_box

BETA = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("white") / "model", hidden=32)


def made_rows() -> tuple[list[Encoded], list[Encoded], dict[Encoded, Encoded]]:
    maker = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 300, (count,), generator=maker).tolist())

    begin = ids(10)  # long enough to be stored once in a pack
    prompts = [(*begin, *ids(count)) for count in (3, 1, 7, 2, 4)]
    rows = [Encoded((*prompt, *ids(count)), len(prompt)) for prompt, count in zip(prompts, (5, 9, 2, 3, 6), strict=True)]
    refusals = {row: Encoded((*row.ids[: row.start], *ids(4)), row.start) for row in rows[:3]}
    return rows[:3], rows[3:], refusals


def built(folder: Path, objective: str, trainable: str) -> WhiteBox:
    base, tokenizer = load_base(folder)
    return build_white_box(
        base, tokenizer, goal=parse_goal(objective), beta=BETA, trainable=trainable, rank=4, lora_alpha=4, seed=0, autocast=False
    )


def moved(model: WhiteBox) -> WhiteBox:
    """As if it had been trained for a while."""
    maker = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=maker))
    return model


def lessons(goal: str, reference: Reference, **more: Any) -> Lessons:
    forget, retain, refusals = made_rows()
    kept = retain if not goal.endswith("none") else []
    return Lessons(Steps(forget, kept, batch=3, seed=0, first=0, last=2, **more), parse_goal(goal), refusals, reference)


def alone(model: Any, row: Encoded) -> Tensor:
    """Log-probabilities over the vocabulary at each answer position, by a pass of the row alone."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


def slow(model: Any, first: Any, objective: str) -> tuple[Tensor, Tensor]:
    """Both losses from rows that are run alone."""
    forget, retain, refusals = made_rows()

    def tokens(which: Any, row: Encoded) -> Tensor:
        return alone(which, row).gather(-1, torch.tensor(row.ids[row.start :]).unsqueeze(-1)).squeeze(-1)

    def ratio(row: Encoded) -> Tensor:
        return tokens(model, row).sum() - tokens(first, row).sum()

    aim, keep = objective.split("+")
    idle = [refusals[row] for row in forget]
    losses = {
        "ga": lambda: torch.cat([tokens(model, row) for row in forget]).mean(),
        "npo": lambda: torch.stack([torch.log(1 + torch.exp(BETA * ratio(row))) for row in forget]).mean() * 2 / BETA,
        "dpo": lambda: (
            torch.stack([torch.log(1 + torch.exp(BETA * (ratio(row) - ratio(no)))) for row, no in zip(forget, idle, strict=True)]).mean()
            / BETA
        ),
        "relabel": lambda: -torch.cat([tokens(model, row) for row in idle]).mean(),
    }
    keeps = {
        "none": lambda: torch.zeros((), dtype=torch.float64),
        "gd": lambda: -torch.cat([tokens(model, row) for row in retain]).mean(),
        "kl": lambda: torch.cat([(alone(first, row).exp() * (alone(first, row) - alone(model, row))).sum(-1) for row in retain]).mean(),
    }
    return losses[aim](), keeps[keep]()


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("objective", [f"{forget}+{retain}" for forget in FORGET for retain in RETAIN])
def test_a_step_equals_the_rows_alone(objective: str, trainable: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = built(folder, objective, trainable)
    reference = model.reference(*lessons(objective, Reference()).rows())
    moved(model)
    losses = model(lessons(objective, reference)[0])
    parameters = model.trained()
    gradients = torch.autograd.grad(losses.forget + 0.5 * losses.retain, list(parameters.values()), allow_unused=True)

    model.inner.set_attn_implementation("eager")
    first = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").requires_grad_(False)
    forget, retain = slow(model.model, first, objective)
    expected = torch.autograd.grad(forget + 0.5 * retain, list(parameters.values()), allow_unused=True)
    use_packed_attention(model.inner)
    assert losses.forget.item() == pytest.approx(forget.item(), abs=1e-4, rel=1e-5)
    assert losses.retain.item() == pytest.approx(retain.item(), abs=1e-4, rel=1e-5)
    for (name, parameter), mine, theirs in zip(parameters.items(), gradients, expected, strict=True):
        assert mine is not None, name
        assert theirs is not None, name
        assert torch.allclose(mine, theirs.to(parameter.dtype), atol=2e-4, rtol=1e-3), name


@pytest.mark.parametrize("objective", ["npo+kl", "dpo+gd", "relabel+kl"])
def test_two_processes_share_one_step(objective: str, folder: Path) -> None:
    model = built(folder, objective, "lora")
    reference = model.reference(*lessons(objective, Reference()).rows())
    moved(model)
    whole = model(lessons(objective, reference)[1])
    parts = [model(lessons(objective, reference, rank=rank, world=2)[1]) for rank in (0, 1)]
    for name in ("forget", "retain"):
        assert sum(getattr(part, name) for part in parts).item() == pytest.approx(getattr(whole, name).item(), abs=1e-5)


def test_the_reference_is_the_model_with_its_adapter_off(folder: Path) -> None:
    model = built(folder, "npo+kl", "lora")
    rows = lessons("npo+kl", Reference()).rows()
    before = model.reference(*rows)
    after = moved(model).reference(*rows)
    assert before.answers == after.answers
    assert all(torch.equal(state, after.states[row]) for row, state in before.states.items())
    assert model.trained(), "switching the adapter off and on leaves it trainable"


def test_the_reference_knows_every_row_once() -> None:
    forget, retain, refusals = made_rows()
    assert [set(rows) for rows in lessons("dpo+kl", Reference()).rows()] == [{*forget, *refusals.values()}, set(retain)]
    assert [set(rows) for rows in lessons("relabel+none", Reference()).rows()] == [set(refusals.values()), set()]


def test_refusals_are_ours_or_a_file(tmp_path: Path) -> None:
    own = read_refusals(BUILT_IN)
    assert len(own) == len(set(own)) == 20
    assert all(line[0].isupper() and line.endswith(".") for line in own)
    file = tmp_path / "refusals.txt"
    file.write_text("\ufeffNo.\n\n  No comment. \nNo.\n", encoding="utf-8")
    assert read_refusals(str(file)) == ("No.", "No comment.")
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="hold no line"):
        read_refusals(str(file))
    with pytest.raises(DataError, match="cannot be read"):
        read_refusals(str(tmp_path / "none.txt"))
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_refusals(str(file))


def test_every_question_gets_a_refusal_that_the_seed_decides() -> None:
    asked = [Example((("user", f"Who is {i}?"),), "A man.", f"row {i}") for i in range(6)]
    answers = [[example.answer for example in refused(asked, ("a", "b", "c"), seed=seed)] for seed in (0, 0, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert any(answers[0] != other for other in answers[2:])
    assert all(sorted(given) == list("aabbcc") for given in answers)
    with pytest.raises(DataError, match="row 9: plain text asks nothing"):
        refused([Example((), "A text.", "row 9", plain=True)], ("a",), seed=0)
