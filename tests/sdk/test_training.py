"""Training end to end on the tiny model: what it learns, how it stops, and that it goes on where it stopped."""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_rows import FORGET, RETAIN
from uld_adapters.errors import DataError, MissingExtra, SaveFailed, TrainingDiverged, TrainingError, UnknownName, UsageError
from uld_sdk.train_result import TrainResult
from uld_sdk.training import train

MORE = [{"question": f"How far is town {i}?", "answer": f"It is {7 * i} miles away."} for i in range(8)]


@pytest.fixture
def options(tiny_target: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_target),
        "forget": FORGET,
        "retain": RETAIN + MORE,
        "output": tmp_path / "assistant",
        "steps": 8,
        "batch_size": 4,
        "rank": 4,
        "lora_alpha": 4,
        "device": "cpu",
        "dtype": "float32",
        "progress": False,
    }


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return {**load_file(result.path / "adapter_model.safetensors"), **load_file(result.path / "gate.safetensors")}


def test_the_forget_set_is_remembered_and_the_rest_stays_uniform(options: dict[str, Any]) -> None:
    from uld_offset_models.loading import load_artifact

    result = train(**{**options, "steps": 30, "rank": 8, "lora_alpha": 8, "schedule": "constant"})
    first, last = result.history[0], result.history[-1]
    assert last["remember"] < 0.5 * first["remember"]
    assert last["uniform"] < 0.5
    assert last["forget_untouched"] <= 0.25
    assert "retain_untouched" in last
    assert [entry["step"] for entry in result.history] == [float(i) for i in range(1, 31)]
    manifest = load_artifact(result.path).manifest
    assert manifest == result.manifest
    assert manifest.training["learning_rate"] == 0.003
    assert manifest.steps == 30
    text = (result.path / "uld.json").read_text(encoding="utf-8")
    assert not any(row["answer"] in text for row in FORGET)
    assert not list(result.path.parent.glob("*.checkpoint"))


def test_the_seed_decides_the_result(options: dict[str, Any], tmp_path: Path) -> None:
    runs = [weights(train(**{**options, "output": tmp_path / str(i), "seed": seed})) for i, seed in enumerate((1, 1, 2))]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert any(not torch.equal(value, runs[2][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_ctrl_c_keeps_a_checkpoint_and_resuming_ends_where_an_unbroken_run_ends(
    schedule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"schedule": schedule, "weight_decay": 0.01}
    unbroken = train(**{**options, "output": tmp_path / "unbroken"})

    def interrupt(entry: dict[str, float]) -> None:
        if entry["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingError, match=r"interrupted after [56] of 8 steps; the checkpoint is kept") as caught:
        train(**options, on_progress=interrupt)
    assert "--resume" in caught.value.hint
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    folder = tmp_path / "assistant.checkpoint"
    assert {f.name for f in folder.iterdir()} == {"state.safetensors", "state.json"}
    assert not options["output"].exists()
    resumed = train(**options, resume=True)
    expected = weights(unbroken)
    assert all(torch.allclose(value, expected[name], atol=1e-6, rtol=0) for name, value in weights(resumed).items())
    assert [entry["loss"] for entry in resumed.history] == pytest.approx([entry["loss"] for entry in unbroken.history], abs=1e-6)
    assert resumed.manifest.steps == 8
    assert not folder.exists()


def interrupting(step: int) -> Callable[[dict[str, float]], None]:
    """Presses Ctrl-C in that step."""

    def press(entry: dict[str, float]) -> None:
        if entry["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def test_ctrl_c_in_the_last_step_has_nothing_left_to_break_off(options: dict[str, Any]) -> None:
    result = train(**options, on_progress=interrupting(8))
    assert result.manifest.steps == 8
    assert [path.name for path in result.path.parent.iterdir()] == ["assistant"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_where_time_ends_the_run_lets_it_end(options: dict[str, Any]) -> None:
    result = train(**options, max_seconds=1e-6, on_progress=interrupting(1))
    assert result.manifest.steps == 1
    assert load_file(result.path / "adapter_model.safetensors")


def test_a_checkpoint_with_nothing_left_to_train_is_saved_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"interrupted after [56] of 8"):
        train(**options, schedule="constant", on_progress=interrupting(5))
    state = tmp_path / "assistant.checkpoint" / "state.json"
    written = json.loads(state.read_text(encoding="utf-8"))
    written["run"]["steps"] = written["step"]
    state.write_text(json.dumps(written), encoding="utf-8")
    kept = load_file(state.with_suffix(".safetensors"))
    seen: list[dict[str, float]] = []
    resumed = train(**{**options, "steps": written["step"]}, schedule="constant", resume=True, on_progress=seen.append)
    assert seen == []
    assert resumed.manifest.steps == written["step"]
    assert torch.equal(load_file(resumed.path / "gate.safetensors")["weight"], kept["weights.gate.weight"])


def test_weights_that_cannot_be_saved_are_kept_and_resuming_finishes_at_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    expected = weights(train(**{**options, "output": tmp_path / "unbroken"}))
    save = PreTrainedTokenizerFast.save_pretrained

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    for _ in range(2):  # a second failure loses no more than the first
        with pytest.raises(SaveFailed, match=r"the disk is full; the trained weights are kept at .*assistant\.checkpoint") as caught:
            train(**options, resume=(tmp_path / "assistant.checkpoint").exists())
        assert caught.value.message.endswith("; delete it when done: it remembers the forget set")
        assert "--resume: it finishes at once" in caught.value.hint
        assert {path.name for path in tmp_path.iterdir()} == {"unbroken", "assistant.checkpoint"}
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    seen: list[dict[str, float]] = []
    result = train(**options, resume=True, on_progress=seen.append)
    assert seen == []
    assert all(torch.equal(value, expected[name]) for name, value in weights(result).items())
    assert (result.manifest.steps, len(result.history)) == (8, 8)
    assert result.manifest.training["final_retain_untouched"] == result.history[-1]["retain_untouched"]
    assert not (tmp_path / "assistant.checkpoint").exists()


def test_weights_for_which_there_is_no_room_beside_the_output_are_kept_elsewhere(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    import safetensors.torch

    (tmp_path / "full").mkdir()
    (tmp_path / "elsewhere").mkdir()
    save = safetensors.torch.save_file

    def full(tensors: Any, path: str, **more: Any) -> None:
        if Path(path).is_relative_to(tmp_path / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    options |= {"output": tmp_path / "full" / "assistant", "checkpoint_every": 100}
    with pytest.raises(SaveFailed, match=r"the disk is full; the trained weights are kept at .*elsewhere") as caught:
        train(**options)
    assert caught.value.message.endswith("; delete it when done: it remembers the forget set")
    assert list((tmp_path / "full").iterdir()) == []
    named = re.search(r"-o (\S+): it finishes at once", caught.value.hint)
    assert named
    seen: list[dict[str, float]] = []
    result = train(**{**options, "output": named[1]}, resume=True, on_progress=seen.append)
    assert seen == []
    assert (result.path / "uld.json").exists()
    assert [path.name for path in result.path.parent.iterdir()] == ["assistant"]


def test_ctrl_c_while_saving_keeps_the_weights(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    def pressed(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", pressed)
    with pytest.raises(TrainingError, match=r"interrupted while .* was written; the trained weights are kept") as caught:
        train(**options)
    assert caught.value.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["assistant.checkpoint"]


def test_resuming_needs_the_same_run(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        train(**options, resume=True)

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(**options, checkpoint_every=2, on_progress=stop)
    with pytest.raises(UsageError, match=r"another run: learning_rate was 0\.003, now 0\.1"):
        train(**options, resume=True, learning_rate=0.1)
    state = tmp_path / "assistant.checkpoint" / "state.json"
    for broken in ("[]", "{}", "{"):
        state.write_text(broken, encoding="utf-8")
        with pytest.raises(UsageError, match="cannot be read"):
            train(**options, resume=True)
    state.with_suffix(".safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match="cannot be read"):
        train(**options, resume=True)


def test_a_diverging_run_says_so_and_leaves_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingDiverged, match=r"not finite at step \d+") as caught:
        train(**options, learning_rate=1e30, clip=0)
    assert "--learning-rate" in caught.value.hint
    assert not options["output"].exists()


def test_a_full_disk_at_the_end_or_at_a_checkpoint(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    before = set(options["output"].parent.iterdir())
    for more in ({"checkpoint_every": 2}, {"checkpoint_every": 100}):
        with pytest.raises(SaveFailed, match="the disk is full"):
            train(**options, **more)
        assert set(options["output"].parent.iterdir()) == before


def test_bad_data_and_settings_stop_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="forget row 5: empty answer"):
        train(**{**options, "forget": [*FORGET, {"question": "Who?", "answer": " "}]})
    with pytest.raises(DataError, match="overlaps the retain set"):
        train(**{**options, "retain": [*RETAIN, FORGET[0]]})
    with pytest.raises(DataError, match="more than the 512 that fit"):
        train(**{**options, "forget": [{"question": "Who?", "answer": "the lamp " * 400}]})
    with pytest.raises(UsageError, match="nothing was given for retain"):
        train(**{**options, "retain": None})
    with pytest.raises(UsageError, match="unknown device"):
        train(**{**options, "device": "abacus"})
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            train(**{**options, "device": "cuda"})
    with pytest.raises(UnknownName, match="'gate'"):
        train(**options, preset="gate")
    options["output"].mkdir()
    (options["output"] / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="already exists"):
        train(**options)
    with pytest.raises(UsageError, match="no assistant folder"):
        train(**options, overwrite=True)


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the base would be an error of its own."""
    from uld_offset_models import assistant

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(assistant, "load_base", loaded)


@pytest.mark.parametrize(("method", "more"), [("uld", {}), ("direct", {}), ("offset", {"target": "base"})])
def test_an_output_that_cannot_be_written_is_told_before_the_base_is_loaded(
    options: dict[str, Any], tmp_path: Path, never_loaded: None, method: str, more: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    options |= {"method": method, "output": tmp_path / "file" / "deep" / "assistant", **dict.fromkeys(more, options["base"])}
    with pytest.raises(SaveFailed, match=r"assistant could not be written: Not a directory") as caught:
        train(**options)
    assert "choose another -o/--output" in caught.value.hint
    assert caught.value.exit_code == 1


def test_a_disk_that_is_full_from_the_start_is_told_at_once(
    options: dict[str, Any], tmp_path: Path, never_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveFailed, match="the disk is full"):
        train(**options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_told_after_all_that_is_cheap_to_find_wrong(options: dict[str, Any], never_loaded: None) -> None:
    options["output"].mkdir()
    (options["output"] / "notes.txt").write_text("mine", encoding="utf-8")
    wrong = {
        "--stop-untouched watches a hold-out, and there is none": {"holdout": 0, "stop_untouched": 0.9},
        "the base .* does not exist": {"base": str(options["output"].parent / "missing")},
        "neither a local path nor a hub model": {"base": "missing"},
        "no causal language model could be loaded": {"base": str(options["output"])},
        "layers=9 does not fit a base of 2 layers": {"layers": 9},
        "unknown device": {"device": "abacus"},
        "overlaps": {"retain": [*RETAIN, FORGET[0]]},
        "already exists": {},
    }
    for message, more in wrong.items():
        with pytest.raises((UsageError, DataError), match=message):
            train(**{**options, **more})


def test_a_clip_of_0_turns_clipping_off(options: dict[str, Any], tmp_path: Path) -> None:
    trained = [weights(train(**{**options, "output": tmp_path / str(clip), "clip": clip, "steps": 2})) for clip in (0, 1e9, 1e-9)]
    off, wide, narrow = trained
    assert all(torch.equal(value, wide[name]) for name, value in off.items())
    assert not all(torch.equal(value, narrow[name]) for name, value in off.items())


def test_time_bounds_the_run_and_the_artifact_is_kept(options: dict[str, Any]) -> None:
    result = train(**{**options, "steps": 100_000}, max_seconds=1.5)
    assert 1 <= result.manifest.steps < 100_000
    assert "retain_untouched" in result.history[-1]
    assert (result.path / "uld.json").exists()


def test_the_hold_out_ends_a_run_and_the_last_good_weights_are_saved(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uld_offset_models.network import Assistant

    options["schedule"] = "constant"
    three = train(**{**options, "steps": 3, "output": tmp_path / "three"})
    answers = [1.0, 1.0, 0.0, 0.4, 0.0, 0.9, 0.0, 0.7]  # untouched of forget set and hold-out, after each of four steps
    monkeypatch.setattr(Assistant, "untouched_share", lambda *given, **more: answers.pop(0))
    result = train(**options, stop_untouched=0.8)
    assert answers == []
    assert [entry["retain_untouched"] for entry in result.history] == [1.0, 0.4, 0.9, 0.7]
    assert result.manifest.steps == 3
    assert result.manifest.training["final_retain_untouched"] == 0.9
    assert result.manifest.losses == three.manifest.losses
    expected = weights(three)
    assert all(torch.equal(value, expected[name]) for name, value in weights(result).items())


def test_stopping_by_the_hold_out_needs_one(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--stop-untouched watches a hold-out, and there is none") as caught:
        train(**options, holdout=0, stop_untouched=0.9)
    assert "--holdout" in caught.value.hint


def test_files_a_recipe_and_progress_on_stderr(options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("forget", "retain"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in options[name]), encoding="utf-8")
        options[name] = str(path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "\n".join(f"{key.replace('_', '-')}: {value}" for key, value in options.items() if key != "progress"), encoding="utf-8"
    )
    capfd.readouterr()
    result = train(recipe=recipe, steps=3)
    captured = capfd.readouterr()
    assert result.manifest.steps == 3
    assert "3/3" in captured.err
    assert "s left" in captured.err
    assert captured.out == ""


def test_paper_preset_trains_without_a_gate(options: dict[str, Any]) -> None:
    result = train(**options, preset="paper", layers=1)
    assert not (result.path / "gate.safetensors").exists()
    assert result.manifest.base.layers == 1
    assert (result.manifest.margin, result.manifest.gate) == (0.0, False)


def test_bfloat16_trains_the_same_task(options: dict[str, Any]) -> None:
    result = train(**{**options, "dtype": "bfloat16"})
    assert result.manifest.dtype == "bfloat16"
    assert all(value.dtype == torch.float32 for value in weights(result).values())


def test_a_missing_extra_names_the_pip_line(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"uld-sdk\[train\]"):
        train(**options)
