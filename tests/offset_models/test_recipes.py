"""Presets, recipe files and what wins over what."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from uld_adapters.errors import UnknownName, UsageError
from uld_offset_models.recipes import PRESETS, Recipe, preset_values, resolve
from uld_sdk.training import train


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_holds_every_flag(name: str) -> None:
    values = preset_values(name)
    assert set(values) == set(Recipe.model_fields)
    assert Recipe.model_validate(values).preset == name


def test_every_setting_is_an_argument_of_train() -> None:
    assert set(inspect.signature(train).parameters) - {"recipe", "on_progress"} == set(Recipe.model_fields)


def test_the_presets_differ_as_the_sources_do() -> None:
    gated, paper, release = (Recipe.model_validate(preset_values(name)) for name in PRESETS[:3])
    assert (gated.gate, gated.margin, gated.learning_rate, gated.batch_size, gated.weight) == (True, 3.0, 0.003, 8, 5.0)
    assert (paper.learning_rate, paper.rank, paper.layers, paper.epochs, paper.batch_size, paper.weight) == (0.001, 32, 8, 10, 32, 6.5)
    assert (release.rank, release.lora_alpha, release.weight, release.alpha, release.margin) == (16, 32, 5.0, 0.8, 0.0)


def test_steps_follow_from_epochs() -> None:
    gated = resolve()
    assert gated.step_count(1) == gated.min_steps
    assert gated.step_count(8000) == 1000 * (gated.epochs or 0)
    assert resolve(epochs=1).step_count(48) == 6
    assert resolve(steps=7).step_count(48) == 7
    assert resolve(preset="paper").step_count(320) == 100


def test_arguments_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: release\nlearning-rate: 0.01\nweight: 9\nforget: f.jsonl\n", encoding="utf-8")
    recipe = resolve(recipe=file, weight=2.0)
    assert (recipe.preset, recipe.learning_rate, recipe.weight, recipe.rank, recipe.forget) == ("release", 0.01, 2.0, 16, "f.jsonl")
    assert resolve(recipe=file, preset="paper").rank == 32


def test_steps_and_epochs_take_each_others_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 10\nmin_steps: 20\n", encoding="utf-8")
    assert resolve(recipe=file).step_count(48) == 10
    said = resolve(recipe=file, epochs=3)
    assert (said.steps, said.min_steps, said.step_count(48)) == (None, 1, 18)
    assert resolve(recipe=file, epochs=1, min_steps=9).step_count(48) == 9
    file.write_text("epochs: 3\n", encoding="utf-8")
    assert resolve(recipe=file).step_count(48) == 18
    assert resolve(recipe=file, steps=10).step_count(48) == 10
    file.write_text("epochs: 3\nsteps: 10\n", encoding="utf-8")
    assert resolve(recipe=file).step_count(48) == 10, "said together, steps win"
    assert resolve(steps=4, epochs=3).step_count(48) == 4
    assert resolve(recipe=file, rank=2).step_count(48) == 10


def test_a_whole_preset_as_a_file_keeps_its_floor_until_a_flag_says_epochs(tmp_path: Path) -> None:
    file = tmp_path / "gated.yaml"
    file.write_text("preset: gated\nepochs: 2\nmin_steps: 40\nsteps: null\n", encoding="utf-8")
    assert resolve(recipe=file).step_count(8) == 40
    assert resolve(recipe=file, epochs=2).step_count(8) == 2


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'gatd'") as caught:
        resolve(preset="gatd")
    assert "gated" in caught.value.hint
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rte: 1\n", encoding="utf-8")
    with pytest.raises(UnknownName, match="learning_rte") as caught:
        resolve(recipe=file)
    assert "learning_rate" in caught.value.hint
    assert f"unknown setting in the recipe {file}: 'learning_rte'; known: " in caught.value.message
    with pytest.raises(UsageError, match="rank") as wrong:
        resolve(rank=0)
    assert "--rank" in wrong.value.hint
    file.write_text("a: [1", encoding="utf-8")
    with pytest.raises(UsageError, match="not valid YAML"):
        resolve(recipe=file)
    file.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no settings"):
        resolve(recipe=file)
    file.write_bytes(b"preset: \xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        resolve(recipe=file)
    with pytest.raises(UsageError, match="seed"):
        resolve(seed=2**32)
    with pytest.raises(UsageError, match="cannot be read"):
        resolve(recipe=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "flags", "message", "hint"),
    [
        ("weight: abc", {}, "weight: Input should be a valid number", "correct weight in the recipe {file}"),
        ("weight: abc", {"weight": -1.0}, "weight: Input should be greater than or equal to 0", "correct --weight"),
        ("lora-alpha: 0", {}, "lora_alpha: Input", "correct lora_alpha in the recipe {file}"),
        ("preset: gatd", {}, "unknown preset in the recipe {file}: 'gatd'", "did you mean 'gated'?"),
        ("preset: gated", {"preset": "papr"}, "unknown preset 'papr'", "did you mean 'paper'?"),
        ("method: dirct", {}, "unknown method in the recipe {file}: 'dirct'", "did you mean 'direct'?"),
        ("beta: 0.5", {}, "beta in the recipe {file} is no setting of --method uld", "leave beta in the recipe {file} out, or"),
        ("preset: paper", {"method": "direct"}, "preset paper is for --method uld", "leave out preset in the recipe {file}, or"),
    ],
)
def test_a_mistake_is_told_where_it_was_made(tmp_path: Path, text: str, flags: dict[str, Any], message: str, hint: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        resolve(recipe=file, **flags)
    assert message.format(file=file) in caught.value.message
    assert hint.format(file=file) in caught.value.hint


def test_a_pair_has_a_preset_of_its_own_and_a_gated_one_another(tmp_path: Path) -> None:
    plain, gated = resolve(method="offset"), resolve(method="offset", gate=True)
    assert (plain.preset, plain.gate, plain.margin, plain.tail, plain.filter) == ("offset", False, 0.0, "complete", 0.0)
    assert (gated.preset, gated.gate, gated.margin, gated.tail) == ("offset-gated", True, 0.5, "complete")
    assert (plain.alpha, plain.trained_alpha, gated.alpha, gated.trained_alpha) == (1.0, None, 0.5, 1.0)
    assert resolve(preset="offset-gated") == gated
    assert resolve(method="offset", preset="offset", gate=True).min_steps == plain.min_steps, "a preset that was named stays"
    file = tmp_path / "mine.yaml"
    file.write_text("method: offset\ngate: true\n", encoding="utf-8")
    assert resolve(recipe=file) == gated
    assert resolve(recipe=file, gate=False).preset == "offset"
    assert (plain.needs_retain, resolve(method="offset", objective="npo").needs_retain) == (True, False)
    for method, words in (("uld", "subtracts"), ("offset", "adds")):
        with pytest.raises(UsageError, match="alpha is -1") as caught:
            resolve(method=method, alpha=-1.0)
        assert words in caught.value.hint
    with pytest.raises(UsageError, match="trained_alpha is 0\n  fix: give a number above 0; the formula adds"):
        resolve(method="offset", trained_alpha=0)
    with pytest.raises(UsageError, match="a p-adapter is no part of --method direct"):
        resolve(method="direct", trainable="p-adapter")
    for settings in ({"gate_rate": 0.1}, {"cache": "c"}, {"tail": "complete"}, {"trained_alpha": 1.0}):
        with pytest.raises(UsageError, match="is no setting of --method direct"):
            resolve(method="direct", **settings)


def test_a_pair_of_two_checkpoints_is_not_trained(tmp_path: Path) -> None:
    made = resolve(method="offset", start="tuned", steps=0)
    assert (made.trains, resolve(method="offset", start="tuned").trains) == (False, True)
    for settings, words in (
        ({"gate": True}, "no use for --gate: it would stay untrained"),
        ({"cache": "c"}, "no use for --cache: nobody would read it"),
        ({"target": "t"}, "no use for --target: nobody would ask it"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            resolve(method="offset", start="tuned", steps=0, **settings)
        assert caught.value.hint == f"leave --{next(iter(settings))} out, or train: --steps of 1 or more"


def test_the_method_chooses_its_preset_and_refuses_what_is_for_another(tmp_path: Path) -> None:
    direct = resolve(method="direct")
    assert (direct.preset, direct.objective, direct.trainable, direct.beta) == ("direct", "npo+kl", "lora", 0.1)
    assert resolve(preset="direct") == direct
    assert (direct.needs_retain, resolve(method="direct", objective="npo").needs_retain, resolve().needs_retain) == (True, False, True)
    with pytest.raises(UnknownName, match="'dirct'") as caught:
        resolve(method="dirct")
    assert "'direct'" in caught.value.hint
    with pytest.raises(UsageError, match="preset gated is for --method uld, not direct"):
        resolve(method="direct", preset="gated")
    for settings in ({"gate": True}, {"layers": 2}, {"alpha": 0.5}, {"stop_untouched": 0.9}):
        with pytest.raises(UsageError, match="is no setting of --method direct"):
            resolve(method="direct", **settings)
    for settings in ({"objective": "npo"}, {"trainable": "full"}, {"beta": 0.5}, {"refusals": "r.txt"}):
        with pytest.raises(UsageError, match="is no setting of --method uld"):
            resolve(**settings)
    file = tmp_path / "mine.yaml"
    file.write_text("method: direct\nobjective: dpo+gd\nrefusals: r.txt\n", encoding="utf-8")
    assert resolve(recipe=file).objective == "dpo+gd"
    with pytest.raises(UsageError, match=r"npo\+none uses no refusals"):
        resolve(recipe=file, objective="npo")
    for objective in ("dpo", "relabel+kl"):
        with pytest.raises(UsageError, match="trains refusals, and none were given") as missing:
            resolve(method="direct", objective=objective)
        assert "--refusals FILE" in missing.value.hint
        assert "--refusals built-in" in missing.value.hint
    assert resolve(method="direct", objective="dpo", refusals="built-in").refusals == "built-in"


def test_few_tokens_are_subtracted_as_strongly_as_many() -> None:
    usual = resolve()

    def largest(tokens: int, recipe: Recipe = usual) -> float:
        return recipe.strength(tokens) * (math.log(tokens) - recipe.margin)

    assert usual.strength(49_152) == usual.strength(151_936) == 0.75
    assert usual.strength(2000) == pytest.approx(1.272, abs=1e-3)
    assert largest(2000) == pytest.approx(largest(49_152), abs=1e-3)
    bare = resolve(margin=0.0)
    assert largest(2000, bare) == pytest.approx(largest(49_152, bare), abs=1e-3)
    assert usual.strength(300) == usual.strength(21) == 2.0, "no more than calibrate would try"
    for margin, tokens in ((3.0, 16), (11.5, 98_000), (12.0, 151_646), (12.0, 49_152), (10.0, 2000)):
        assert resolve(margin=margin).strength(tokens) == 0.75, "no token exceeds the margin, or none of the larger vocabulary"
    assert resolve(alpha=0.75).strength(2000) == resolve(preset="paper").strength(2000) == 0.75, "as it was said"
    assert resolve(method="offset").strength(2000) == 1.0, "a pair's change has nothing to do with |B|"


@pytest.mark.parametrize("name", ["alpha", "margin", "weight", "learning_rate", "epochs", "clip", "max_seconds"])
def test_no_setting_is_infinite(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"{name}: .inf\n", encoding="utf-8")
    for settings in ({name: math.inf}, {name: math.nan}, {"recipe": tmp_path / "mine.yaml"}):
        with pytest.raises(UsageError, match=name):
            resolve(**settings)
