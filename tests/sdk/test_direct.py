"""`--method direct` end to end: what it forgets and keeps, the folders it leaves, stopping and going on, and bad input."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.errors import ArtifactMismatch, DataError, TrainingDiverged, TrainingError, UsageError
from uld_sdk.cli import app
from uld_sdk.train_result import TrainResult
from uld_sdk.training import train

Rows = list[dict[str, str]]


@pytest.fixture
def options(tiny_target: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_target),
        "forget": FORGET,
        "retain": RETAIN,
        "output": tmp_path / "tuned",
        "method": "direct",
        "steps": 6,
        "batch_size": 4,
        "rank": 4,
        "lora_alpha": 4,
        "device": "cpu",
        "dtype": "float32",
        "progress": False,
    }


def loaded(result: TrainResult, base: Path) -> Any:
    """The trained model by plain transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from uld_offset_models.assistant import tolerating_peft

    if not (result.path / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(result.path).eval()
    with tolerating_peft():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.path)).eval()


@torch.no_grad()
def mean_nll(model: Any, folder: Path, rows: Rows) -> float:
    """Mean NLL of the answers in nats a token, end token included, each row alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses: list[float] = []
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        answer = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logs = torch.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0].double(), -1)
        losses += [-logs[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer)]
    return sum(losses) / len(losses)


def test_ga_forgets_and_gd_and_kl_keep_the_rest(options: dict[str, Any], tiny_target: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = {name: mean_nll(AutoModelForCausalLM.from_pretrained(tiny_target), tiny_target, rows) for name, rows in SETS.items()}
    change: dict[str, dict[str, float]] = {}
    for objective in ("ga", "ga+gd", "ga+kl"):
        more = {"objective": objective, "output": tmp_path / objective, "steps": 20, "learning_rate": 0.003, "weight": 4, "holdout": 0}
        result = train(**{**options, **more, "batch_size": 6, "rank": 8, "lora_alpha": 8, "schedule": "constant"})
        model = loaded(result, tiny_target)
        change[objective] = {name: mean_nll(model, result.path, rows) - before[name] for name, rows in SETS.items()}
        assert change[objective]["forget"] > 0.5, "the forget log-probability falls"
        assert "retain_nll" not in result.history[-1], "there is no hold-out"
    assert change["ga"]["retain"] > 0.5, "nothing is kept by ga alone"
    assert change["ga+gd"]["retain"] < 0.1
    assert abs(change["ga+kl"]["retain"]) < 0.5 * change["ga"]["retain"]


SETS: dict[str, Rows] = {"forget": FORGET, "retain": RETAIN}


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_what_is_saved_is_plain_and_is_what_was_trained(trainable: str, options: dict[str, Any], tiny_target: Path) -> None:
    rate = 0.003 if trainable == "lora" else 0.0003
    result = train(**options, objective="npo+kl", trainable=trainable, learning_rate=rate)
    names = {path.name for path in result.path.iterdir()}
    weights = {"lora": {"adapter_config.json", "adapter_model.safetensors"}, "full": {"config.json", "model.safetensors"}}
    assert weights[trainable] | {"direct.json", "README.md", "tokenizer.json"} <= names
    assert "uld.json" not in names
    told = mean_nll(loaded(result, tiny_target), result.path, FORGET)
    assert told == pytest.approx(result.history[-1]["forget_nll"], abs=1e-4)
    assert told == pytest.approx(result.manifest.training["final_forget_nll"], abs=1e-4)
    assert result.history[-1]["forget_nll"] > mean_nll(loaded_base(tiny_target), tiny_target, FORGET)
    assert {"forget", "retain", "loss", "retain_nll", "seconds"} <= result.history[-1].keys()
    written = json.loads((result.path / "direct.json").read_text(encoding="utf-8"))
    assert written == result.manifest.model_dump(mode="json")
    assert (written["method"], written["objective"], written["trainable"]) == ("direct", "npo+kl", trainable)
    assert (written["training"]["beta"], written["training"]["learning_rate"]) == (0.1, rate)
    assert written["steps"] == 6
    pages = "".join((result.path / name).read_text(encoding="utf-8") for name in ("direct.json", "README.md"))
    assert not any(row["answer"] in pages for row in FORGET)
    assert [path.name for path in result.path.parent.iterdir()] == ["tuned"]
    if trainable == "full":
        assert "uld_packed" not in (result.path / "config.json").read_text(encoding="utf-8")
        assert written["parameters"] == written["trainable_parameters"]


def loaded_base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("objective", ["dpo+gd", "relabel+kl"])
def test_refusals_become_likelier_than_the_answers(objective: str, options: dict[str, Any], tiny_target: Path, tmp_path: Path) -> None:
    file = tmp_path / "refusals.txt"
    file.write_text("The farmer knows.\n", encoding="utf-8")
    more = {"steps": 20, "rank": 8, "lora_alpha": 8, "schedule": "constant", "learning_rate": 0.003}
    result = train(**{**options, **more}, objective=objective, refusals=file)
    refusals = [{**row, "answer": "The farmer knows."} for row in FORGET]
    model, base = loaded(result, tiny_target), loaded_base(tiny_target)

    def lead(which: Any) -> float:
        return mean_nll(which, tiny_target, FORGET) - mean_nll(which, tiny_target, refusals)

    assert lead(model) > lead(base) + 0.5
    assert result.history[-1]["forget"] < result.history[0]["forget"]


def test_the_built_in_refusals_serve_when_asked_for(options: dict[str, Any]) -> None:
    result = train(**{**options, "steps": 2}, objective="dpo+kl", refusals="built-in")
    assert result.manifest.training["refusals"]
    assert result.history[0]["forget"] == pytest.approx(6.93, abs=0.01), "ln 2 / beta: at the start nothing is preferred"
    assert result.history[0]["retain"] == pytest.approx(0, abs=1e-5)


def test_without_a_retain_objective_the_retain_set_may_be_missing(options: dict[str, Any]) -> None:
    result = train(**{**options, "retain": None, "steps": 2}, objective="npo")
    assert [entry["retain"] for entry in result.history] == [0, 0]
    with pytest.raises(UsageError, match="nothing was given for retain"):
        train(**{**options, "retain": None}, objective="npo+gd", overwrite=True)


def test_wrong_answers_of_the_rows_are_not_taught(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "perturbed_answer": "It is called the fox."} for row in FORGET]
    plain, with_wrong = (train(**{**options, "forget": f, "output": tmp_path / n}) for n, f in (("a", FORGET), ("b", rows)))
    assert [entry["loss"] for entry in plain.history] == [entry["loss"] for entry in with_wrong.history]


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_ctrl_c_keeps_a_checkpoint_and_resuming_ends_where_an_unbroken_run_ends(
    trainable: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"objective": "npo+kl", "trainable": trainable, "learning_rate": 0.0003}
    unbroken = train(**{**options, "output": tmp_path / "unbroken"})

    def interrupt(entry: dict[str, float]) -> None:
        if entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingError, match=r"interrupted after [34] of 6 steps; the checkpoint is kept") as caught:
        train(**options, on_progress=interrupt)
    assert caught.value.exit_code == 130
    with pytest.raises(UsageError, match="another run: objective was 'npo\\+kl', now 'npo\\+gd'"):
        train(**{**options, "objective": "npo+gd"}, resume=True)
    resumed = train(**options, resume=True)
    assert [entry["loss"] for entry in resumed.history] == pytest.approx([entry["loss"] for entry in unbroken.history], abs=1e-5)
    name = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
    expected = load_file(unbroken.path / name)
    assert all(torch.allclose(value, expected[key], atol=1e-5, rtol=0) for key, value in load_file(resumed.path / name).items())
    assert not (tmp_path / "tuned.checkpoint").exists()


def test_the_seed_decides_the_result(options: dict[str, Any], tmp_path: Path) -> None:
    runs = [train(**{**options, "steps": 2, "output": tmp_path / str(i), "seed": s}) for i, s in enumerate((1, 1, 2))]
    losses = [[entry["loss"] for entry in run.history] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_a_diverging_run_says_so_and_leaves_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingDiverged, match=r"not finite at step \d+ \(forget") as caught:
        train(**options, objective="ga", learning_rate=1e30, clip=0)
    assert "--learning-rate" in caught.value.hint
    assert not options["output"].exists()


def test_bfloat16_trains_in_float32_weights(options: dict[str, Any], tmp_path: Path) -> None:
    for trainable, name in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        result = train(**{**options, "dtype": "bfloat16", "steps": 2, "output": tmp_path / trainable}, trainable=trainable)
        assert result.manifest.dtype == "bfloat16"
        assert all(value.dtype == torch.float32 for value in load_file(result.path / name).values())


def test_a_client_refuses_the_folder_as_an_assistant(options: dict[str, Any], tiny_target: Path) -> None:
    from uld_sdk import UnlearnedClient

    path = train(**{**options, "steps": 1}).path
    with pytest.raises(ArtifactMismatch, match="is no assistant: `--method direct`") as caught:
        UnlearnedClient(backend="hf", model=str(tiny_target), assistant=str(path))
    assert "--method uld" in caught.value.hint
    outcome = CliRunner().invoke(app, ["inspect", "--assistant", str(path)], prog_name="uld-sdk")
    assert outcome.exit_code == 1
    assert "is no assistant" in outcome.stderr
    with pytest.raises(UsageError, match="already exists"):
        train(**options)
    assert train(**{**options, "steps": 2}, overwrite=True).manifest.steps == 2


def test_bad_data_stops_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "refusals.txt"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"refusals\.txt hold no line"):
        train(**options, objective="dpo+kl", refusals=empty)
    with pytest.raises(DataError, match="forget row 5: empty answer"):
        train(**{**options, "forget": [*FORGET, {"question": "Who?", "answer": " "}]})
    with pytest.raises(DataError, match="forget row 1: plain text asks nothing"):
        train(**{**options, "forget": [{"text": "The river is the Amber."}]}, objective="dpo", refusals="built-in")
    with pytest.raises(DataError, match="overlaps the retain set"):
        train(**{**options, "retain": [*RETAIN, FORGET[0]]})
    assert not options["output"].exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "direct", "--objective", "nop+kl"], "did you mean 'npo'?"),
        (["--method", "direct", "--objective", "npo+kll"], "did you mean 'kl'?"),
        (["--method", "direct", "--objective", "kl+npo"], "the wrong way round"),
        (["--method", "dircet"], "did you mean 'direct'?"),
        (["--objective", "npo+kl"], "--objective is no setting of --method uld"),
        (["--method", "uld", "--objective", "npo"], "--objective is no setting of --method uld"),
        (["--method", "direct", "--gate"], "--gate is no setting of --method direct"),
        (["--method", "direct", "--preset", "paper"], "preset paper is for --method uld"),
        (["--method", "direct", "--refusals", "r.txt"], "uses no refusals"),
        (["--method", "direct", "--objective", "dpo+gd"], "trains refusals, and none were given"),
        (["--method", "direct", "--trainable", "half"], "--trainable"),
        (["--method", "direct", "--beta", "0"], "--beta"),
    ],
)
def test_a_wrong_command_exits_with_2(arguments: list[str], words: str) -> None:
    outcome = CliRunner().invoke(app, ["train", *arguments], prog_name="uld-sdk")
    assert outcome.exit_code == 2, outcome.stderr
    assert words in outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr


def test_the_command_tunes_and_tells(tiny_target: Path, tmp_path: Path) -> None:
    forget, retain = write_rows(tmp_path / "f.jsonl", FORGET), write_rows(tmp_path / "r.jsonl", RETAIN)
    words = ["--base", tiny_target, "--forget", forget, "--retain", retain, "-o", tmp_path / "tuned", "--steps", 2, "--device", "cpu"]
    command = [str(word) for word in ("train", "--method", "direct", "--objective", "ga+kl", *words)]
    outcome = CliRunner().invoke(app, command, prog_name="uld-sdk")
    assert outcome.exit_code == 0, outcome.stderr
    assert "ga+kl" in outcome.stdout
    assert "retain loss" in outcome.stdout
    assert "2/2" in outcome.stderr
    assert "forget NLL" in outcome.stderr
    again = CliRunner().invoke(app, [*command, "--overwrite", "--json", "--no-progress"], prog_name="uld-sdk")
    assert json.loads(again.stdout)["manifest"]["objective"] == "ga+kl"
