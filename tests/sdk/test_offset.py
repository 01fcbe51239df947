"""`--method offset` end to end: what a pair makes its target forget and keep, the folders it leaves, stopping and going on, bad input."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.errors import DataError, TrainingDiverged, TrainingError, UsageError
from uld_sdk import UnlearnedClient
from uld_sdk.cli import app
from uld_sdk.train_result import TrainResult
from uld_sdk.training import train

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model of the target's tokenizer."""
    return tiny.tiny_model(tmp_path_factory.mktemp("pairs") / "small", hidden=48, seed=4, scale=6.0)


@pytest.fixture
def options(small: Path, tiny_target: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(small),
        "target": str(tiny_target),
        "forget": FORGET,
        "retain": RETAIN,
        "output": tmp_path / "pair",
        "method": "offset",
        "steps": 6,
        "batch_size": 4,
        "rank": 4,
        "lora_alpha": 4,
        "device": "cpu",
        "dtype": "float32",
        "progress": False,
    }


def mean_logprob(path: Path | None, target: Path, rows: Rows, **rule: Any) -> float:
    """Mean log-probability of the answers in nats a token under the unlearned target, or under the plain one."""
    with UnlearnedClient(backend="hf", model=str(target), assistant=None if path is None else str(path), **rule) as client:
        scores = [client.score(row["question"], row["answer"]) for row in rows]
    return float(np.mean([value for score in scores for value in score.lower]))


@pytest.mark.parametrize("trainable", ["lora", "full", "p-adapter"])
def test_the_target_with_the_pair_forgets_and_keeps(trainable: str, options: dict[str, Any], tiny_target: Path, tmp_path: Path) -> None:
    rate, weight = {"lora": (0.01, 3), "full": (0.002, 3), "p-adapter": (0.05, 30)}[trainable]
    more = {"steps": 40, "learning_rate": rate, "rank": 8, "lora_alpha": 8, "batch_size": 6, "holdout": 0, "weight": weight}
    change: dict[str, dict[str, float]] = {}
    for objective in ("npo", "npo+kl"):
        result = train(**{**options, **more, "output": tmp_path / objective}, objective=objective, trainable=trainable)
        change[objective] = {
            name: mean_logprob(result.path, tiny_target, rows) - mean_logprob(None, tiny_target, rows)
            for name, rows in (("forget", FORGET), ("retain", RETAIN))
        }
        assert change[objective]["forget"] < -0.3, change
    assert abs(change["npo+kl"]["retain"]) < 0.6 * abs(change["npo"]["retain"]), change


@pytest.mark.parametrize("trainable", ["lora", "full", "p-adapter"])
@pytest.mark.parametrize("gate", [False, True])
def test_what_is_saved_is_what_was_trained(
    trainable: str, gate: bool, options: dict[str, Any], small: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """The last step's losses and the saved pair tell of the same weights, by the log-probabilities of one answer."""
    one: dict[str, Any] = {"forget": FORGET[:1], "retain": RETAIN, "batch_size": 1, "holdout": 0.0, "steps": 8, "schedule": "constant"}
    result = train(**{**options, **one}, objective="ga", trainable=trainable, gate=gate, learning_rate=0.005)
    manifest = result.manifest
    assert manifest.method == "offset"
    assert manifest.pair is not None
    assert (manifest.pair.objective, manifest.pair.trainable, manifest.pair.alpha) == ("ga+none", trainable, 1.0)
    assert (manifest.alpha, manifest.tail, manifest.gate) == (0.5 if gate else 1.0, "complete", gate)
    assert manifest.preset == ("offset-gated" if gate else "offset")
    assert (result.path / "gate.safetensors").exists() == gate
    assert json.loads((result.path / "uld.json").read_text(encoding="utf-8")) == manifest.model_dump(mode="json")
    page = (result.path / "README.md").read_text(encoding="utf-8") + (result.path / "uld.json").read_text(encoding="utf-8")
    assert FORGET[0]["answer"] not in page
    assert "the base o that it started from" in page
    assert "uld_packed" not in "".join(path.read_text(encoding="utf-8") for path in result.path.glob("config.json"))
    # One more step's loss is that of the weights which were saved, had it been the last but one.
    longer = train(
        **{**options, **one, "steps": 9, "output": tmp_path / "longer"}, objective="ga", trainable=trainable, gate=gate, learning_rate=0.005
    )
    with UnlearnedClient(backend="hf", model=str(tiny_target), assistant=str(result.path), margin=0.0, alpha=1.0) as client:
        score = client.score(FORGET[0]["question"], FORGET[0]["answer"] + "<|eos|>")
    assert score.exact
    assert np.mean(score.lower) == pytest.approx(longer.history[-1]["forget"], abs=2e-3)


def cached(options: dict[str, Any], url: str, folder: Path, **more: Any) -> Path:
    from uld_sdk.caching.job import cache

    words = {name: options[name] for name in ("forget", "retain", "base")}
    cache(output=folder, backend="vllm", base_url=url, top_logprobs=20, **{**words, **more})
    return folder


def test_training_reads_the_cache_and_never_the_server(options: dict[str, Any], vllm_server: Any, tmp_path: Path) -> None:
    folder = cached(options, vllm_server.url, tmp_path / "cache")
    asked = vllm_server.app.state.stats.requests if hasattr(vllm_server, "app") else None
    del options["target"]
    runs = [train(**{**options, "output": tmp_path / str(number)}, cache=folder) for number in (1, 2)]
    assert [entry["loss"] for entry in runs[0].history] == [entry["loss"] for entry in runs[1].history]
    assert runs[0].manifest.pair is not None
    assert runs[0].manifest.pair.top_logprobs == 20
    assert len(list(folder.glob("states-*"))) == 1, "what the frozen model says is kept for the next training"
    if asked is not None:
        assert vllm_server.app.state.stats.requests == asked
    truncated = train(**{**options, "output": tmp_path / "t"}, cache=folder, tail="truncate")
    assert truncated.manifest.tail == "truncate"
    assert truncated.history[-1]["loss"] != runs[0].history[-1]["loss"]


def test_a_complete_cache_is_worth_the_target_itself(options: dict[str, Any], vllm_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    from uld_sdk.caching.job import cache

    words = {name: options[name] for name in ("forget", "retain", "base")}
    cache(output=tmp_path / "cache", backend="hf", model=str(tiny_target), top_logprobs=400, **words)
    local = train(**{**options, "output": tmp_path / "local"})
    del options["target"]
    read = train(**options, cache=tmp_path / "cache")
    assert [entry["loss"] for entry in read.history] == pytest.approx([entry["loss"] for entry in local.history], abs=5e-3)


def test_a_start_is_another_checkpoint_than_the_frozen_model(
    options: dict[str, Any], small: Path, tiny_target: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        model.lm_head.weight.mul_(1.1)
    start = tmp_path / "start"
    model.save_pretrained(start)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (small / name).exists():
            (start / name).write_bytes((small / name).read_bytes())
    for trainable in ("lora", "full"):
        result = train(**{**options, "steps": 1, "output": tmp_path / trainable}, start=start, trainable=trainable, learning_rate=1e-9)
        assert result.manifest.pair is not None
        assert result.manifest.pair.whole
        assert result.history[0]["retain"] > 1e-3, "o' is another than o from the first step"
        with UnlearnedClient(backend="hf", model=str(tiny_target), assistant=str(result.path)) as client:
            assert not client.generate("Who?", max_new_tokens=4).untouched
        saved = load_file(result.path / "model.safetensors")
        assert torch.allclose(saved["lm_head.weight"], model.lm_head.weight, atol=1e-6)
    page = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "the base o, another checkpoint of its kind" in page
    assert "| training | 1 steps in" in page
    none = {"target": None, "forget": None, "retain": None}
    packed = train(**{**options, **none, "steps": 0, "output": tmp_path / "packed"}, start=start)
    page = (packed.path / "README.md").read_text(encoding="utf-8")
    assert "| training | none |" in page
    assert "| made of | two checkpoints, without training; tail policy complete |" in page
    assert "losses" not in page
    with pytest.raises(UsageError, match="has no use for --gate"):
        train(**{**options, **none, "steps": 0, "output": tmp_path / "x"}, start=start, gate=True)
    with pytest.raises(UsageError, match="nothing was given for forget"):
        train(**{**options, **none, "output": tmp_path / "x"}, start=start)
    assert packed.manifest.pair is not None
    assert (packed.manifest.pair.objective, packed.manifest.pair.target, packed.manifest.losses) == ("none", "none", {})
    saved = load_file(packed.path / "model.safetensors")
    assert torch.allclose(saved["lm_head.weight"], model.lm_head.weight, atol=1e-6)
    with UnlearnedClient(backend="hf", model=str(tiny_target), assistant=str(packed.path)) as client:
        assert not client.generate("Who?", max_new_tokens=4).untouched
    with pytest.raises(UsageError, match="nothing is learned in 0 steps"):
        train(**{**options, "steps": 0, "output": tmp_path / "x"})
    other = tiny.tiny_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(UsageError, match="another tokenizer"):
        train(**{**options, "output": tmp_path / "x"}, start=other)
    with pytest.raises(UsageError, match="p-adapter stands before the base"):
        train(**{**options, "output": tmp_path / "x"}, start=start, trainable="p-adapter")


@pytest.mark.parametrize("objective", ["dpo+gd", "relabel+kl"])
def test_refusals_become_likelier_than_the_answers(objective: str, options: dict[str, Any], tiny_target: Path, tmp_path: Path) -> None:
    file = tmp_path / "refusals.txt"
    file.write_text("The farmer knows.\n", encoding="utf-8")
    more = {"steps": 30, "rank": 8, "lora_alpha": 8, "learning_rate": 0.01}
    result = train(**{**options, **more}, objective=objective, refusals=file)
    refusals = [{**row, "answer": "The farmer knows."} for row in FORGET]

    def lead(path: Path | None) -> float:
        return mean_logprob(path, tiny_target, refusals) - mean_logprob(path, tiny_target, FORGET)

    assert lead(result.path) > lead(None) + 0.3
    assert result.history[-1]["forget"] < result.history[0]["forget"]


@pytest.mark.parametrize("trainable", ["lora", "full", "p-adapter"])
def test_ctrl_c_keeps_a_checkpoint_and_resuming_ends_where_an_unbroken_run_ends(
    trainable: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"objective": "npo+kl", "trainable": trainable, "learning_rate": 0.0003, "gate": True, "margin": 50.0}
    unbroken = train(**{**options, "output": tmp_path / "unbroken"})

    def interrupt(entry: dict[str, float]) -> None:
        if entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingError, match=r"interrupted after [34] of 6 steps; the checkpoint is kept"):
        train(**options, on_progress=interrupt)
    with pytest.raises(UsageError, match=r"another run: alpha was 0\.5, now 2\.0"):
        train(**{**options, "alpha": 2.0}, resume=True)
    resumed = train(**options, resume=True)
    assert [entry["loss"] for entry in resumed.history] == pytest.approx([entry["loss"] for entry in unbroken.history], abs=1e-5)
    name = "model.safetensors" if trainable == "full" else "adapter_model.safetensors"
    for file in (name, "gate.safetensors"):
        expected = load_file(unbroken.path / file)
        assert all(torch.allclose(value, expected[key], atol=1e-5, rtol=0) for key, value in load_file(resumed.path / file).items())
    assert not (tmp_path / "pair.checkpoint").exists()


def test_a_gate_may_move_at_a_rate_of_its_own(options: dict[str, Any], tmp_path: Path) -> None:
    still: dict[str, Any] = {"gate": True, "margin": 50.0, "steps": 3, "learning_rate": 1e-5, "schedule": "constant"}
    moved = {}
    for rate in (1e-5, 0.1):
        result = train(**{**options, **still, "output": tmp_path / str(rate)}, gate_rate=rate, objective="ga")
        moved[rate] = load_file(result.path / "gate.safetensors")["weight"].abs().max().item()
    assert moved[1e-5] <= 4e-5
    assert moved[0.1] > 0.02


def test_alpha_in_training_may_be_another_than_at_inference(options: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for alphas in ((1.0, None), (0.2, 1.0), (0.2, None)):
        alpha, trained = alphas
        result = train(**{**options, "steps": 2, "output": tmp_path / str(alphas)}, alpha=alpha, trained_alpha=trained)
        assert result.manifest.pair is not None
        assert (result.manifest.alpha, result.manifest.pair.alpha) == (alpha, trained or alpha)
        found[alphas] = load_file(result.path / "adapter_model.safetensors")
    first, second, third = found.values()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_an_open_gate_is_told(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="the gate has not shut: 0% of the retain hold-out stand untouched"):
        train(**{**options, "steps": 3}, gate=True, margin=1e-6, learning_rate=0.01)


def test_a_diverging_run_says_so_and_leaves_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingDiverged, match=r"not finite at step \d+ \(forget"):
        train(**options, objective="ga", learning_rate=1e30, clip=0)
    assert not options["output"].exists()


def test_bfloat16_trains_in_float32_weights(options: dict[str, Any], tmp_path: Path) -> None:
    for trainable, name in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        result = train(
            **{**options, "dtype": "bfloat16", "steps": 2, "output": tmp_path / trainable, "margin": 50.0}, trainable=trainable, gate=True
        )
        assert result.manifest.dtype == "bfloat16"
        assert all(value.dtype == torch.float32 for value in load_file(result.path / name).values())


Wrong = Callable[[dict[str, Any], Path, str], dict[str, Any]]


def other_template(options: dict[str, Any], tmp_path: Path, url: str) -> dict[str, Any]:
    return {"cache": cached(options, url, tmp_path / "cache", chat_template=False)}


def other_data(options: dict[str, Any], tmp_path: Path, url: str) -> dict[str, Any]:
    return {"cache": cached(options, url, tmp_path / "cache", forget=FORGET[:2])}


def no_refusals(options: dict[str, Any], tmp_path: Path, url: str) -> dict[str, Any]:
    return {"cache": cached(options, url, tmp_path / "cache"), "objective": "dpo+kl", "refusals": "built-in"}


def other_tokenizer(options: dict[str, Any], tmp_path: Path, url: str) -> dict[str, Any]:
    return {"cache": cached(options, url, tmp_path / "cache"), "base": str(tiny.tiny_model(tmp_path / "other", vocab_size=300))}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (other_template, "was made for another chat template"),
        (other_data, r"was made for other data: it lacks \d+ of \d+ rows, forget row 3"),
        (no_refusals, "was made for other data: it lacks"),
        (other_tokenizer, "was made for another tokenizer"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(wrong: Wrong, words: str, options: dict[str, Any], vllm_server: Any, tmp_path: Path) -> None:
    del options["target"]
    with pytest.raises(UsageError, match=words) as caught:
        train(**{**options, **wrong(options, tmp_path, vllm_server.url)})
    assert "uld-sdk cache" in caught.value.hint
    assert not options["output"].exists()


def test_bad_data_stops_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="forget row 5: empty answer"):
        train(**{**options, "forget": [*FORGET, {"question": "Who?", "answer": " "}]})
    with pytest.raises(DataError, match="forget row 1: plain text asks nothing"):
        train(**{**options, "forget": [{"text": "The river is the Amber."}]}, objective="dpo", refusals="built-in")
    with pytest.raises(UsageError, match="no cache"):
        train(**{**options, "target": None}, cache=tmp_path)
    with pytest.raises(UsageError, match="watches a hold-out"):
        train(**{**options, "holdout": 0.0}, stop_untouched=0.9)
    assert not options["output"].exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "nop+kl"], "did you mean 'npo'?"),
        (["--objective", "npo+kll"], "did you mean 'kl'?"),
        (["--objective", "dpo"], "trains refusals, and none were given"),
        (["--alpha", "-1"], "alpha is -1"),
        (["--trainable", "adapter"], "--trainable"),
        (["--tail", "complet"], "--tail"),
        ([], "nothing says what the target thinks"),
        (["--cache", "c", "--target", "t"], "--cache and --target both say"),
        (["--preset", "gated"], "preset gated is for --method uld"),
    ],
)
def test_a_wrong_command_exits_with_2(arguments: list[str], words: str, small: Path, tmp_path: Path) -> None:
    forget, retain = write_rows(tmp_path / "f.jsonl", FORGET), write_rows(tmp_path / "r.jsonl", RETAIN)
    rest = ["--base", str(small), "--forget", str(forget), "--retain", str(retain), "-o", str(tmp_path / "out")]
    outcome = CliRunner().invoke(app, ["train", "--method", "offset", *rest, *arguments], prog_name="uld-sdk")
    assert outcome.exit_code == 2, outcome.stderr
    assert words in " ".join(outcome.stderr.split())
    assert outcome.stdout == ""


def test_settings_of_a_pair_are_none_of_other_methods() -> None:
    for arguments in (["--cache", "c"], ["--target", "t"], ["--start", "s"], ["--tail", "complete"], ["--virtual-tokens", "4"]):
        for method in ("uld", "direct"):
            outcome = CliRunner().invoke(app, ["train", "--method", method, *arguments], prog_name="uld-sdk")
            assert outcome.exit_code == 2
            assert f"is no setting of --method {method}" in outcome.stderr


def test_the_command_trains_and_tells(small: Path, tiny_target: Path, tmp_path: Path) -> None:
    forget, retain = write_rows(tmp_path / "f.jsonl", FORGET), write_rows(tmp_path / "r.jsonl", RETAIN)
    words = ["--base", small, "--target", tiny_target, "--forget", forget, "--retain", retain, "-o", tmp_path / "pair", "--steps", 2]
    command = [str(word) for word in ("train", "--method", "offset", "--objective", "npo+kl", *words, "--device", "cpu")]
    outcome = CliRunner().invoke(app, command, prog_name="uld-sdk")
    assert outcome.exit_code == 0, outcome.stderr
    assert "pair" in outcome.stdout
    assert "retain loss" in outcome.stdout
    assert "untouched" in outcome.stderr
    again = CliRunner().invoke(app, [*command, "--overwrite", "--json", "--no-progress"], prog_name="uld-sdk")
    manifest = json.loads(again.stdout)["manifest"]
    assert (manifest["method"], manifest["pair"]["objective"]) == ("offset", "npo+kl")
    told = CliRunner().invoke(app, ["inspect", "--assistant", str(tmp_path / "pair")], prog_name="uld-sdk")
    assert told.exit_code == 0, told.stderr
    assert "offset" in told.stdout
    assert "npo+kl" in told.stdout


def test_result_is_a_train_result(options: dict[str, Any]) -> None:
    result = train(**{**options, "steps": 1})
    assert isinstance(result, TrainResult)
    assert {"forget", "retain", "loss", "forget_untouched", "retain_untouched", "seconds"} <= result.history[-1].keys()
