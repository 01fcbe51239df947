"""`--method offset` against a target of another tokenizer: from its cache to answers through the pair, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.errors import ArtifactCorrupt, TokenizerMismatch, UsageError
from uld_sdk import UnlearnedClient
from uld_sdk.caching.job import cache
from uld_sdk.cli import app
from uld_sdk.training import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with a tokenizer of its own."""
    return tiny.tiny_model(tmp_path_factory.mktemp("bridge") / "base", vocab_size=330, hidden=48, seed=4, scale=6.0)


@pytest.fixture(scope="module")
def cached(tiny_target: Path, vllm_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the target says, in its own tokens."""
    folder = tmp_path_factory.mktemp("bridge") / "cache"
    cache(
        output=folder, forget=FORGET, retain=RETAIN, backend="vllm", base_url=vllm_server.url, tokenizer=str(tiny_target), top_logprobs=20
    )
    return folder


@pytest.fixture
def options(base: Path, cached: Path, tiny_target: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(base),
        "cache": str(cached),
        "target_tokenizer": str(tiny_target),
        "forget": FORGET,
        "retain": RETAIN,
        "output": tmp_path / "pair",
        "method": "offset",
        "steps": 4,
        "batch_size": 4,
        "rank": 8,
        "lora_alpha": 8,
        "holdout": 0.1,
        "device": "cpu",
        "dtype": "float32",
        "progress": False,
    }


def mean_logprob(path: Path | None, target: Path, rows: list[dict[str, str]]) -> float:
    """Mean log-probability of the answers in nats an answer, under the unlearned target or the plain one."""
    with UnlearnedClient(backend="hf", model=str(target), assistant=None if path is None else str(path)) as client:
        scores = [client.score(row["question"], row["answer"]) for row in rows]
    return sum(score.logprob for score in scores) / sum(len(score.token_ids) for score in scores)


def test_the_target_with_the_pair_forgets_and_keeps(options: dict[str, Any], tiny_target: Path) -> None:
    result = train(**{**options, "steps": 40, "learning_rate": 0.01, "batch_size": 6, "weight": 3}, objective="npo+kl", tail="truncate")
    assert result.history[-1]["forget"] < result.history[0]["forget"] - 0.3
    change = {
        name: mean_logprob(result.path, tiny_target, rows) - mean_logprob(None, tiny_target, rows)
        for name, rows in (("forget", FORGET), ("retain", RETAIN))
    }
    assert change["forget"] < -0.3, change
    assert abs(change["retain"]) < 0.6 * abs(change["forget"]), change
    with UnlearnedClient(backend="hf", model=str(tiny_target), assistant=str(result.path)) as client:
        assert client.generate(FORGET[0]["question"], max_new_tokens=4).report.alignment == "bridge"


@pytest.mark.parametrize("more", [{"gate": True}, {"trainable": "full", "tail": "truncate"}, {"trainable": "p-adapter"}])
def test_every_kind_of_pair(options: dict[str, Any], more: dict[str, Any]) -> None:
    result = train(**{**options, **more}, objective="npo+kl")
    assert result.manifest.pair is not None
    assert result.manifest.pair.top_logprobs == 20
    if more.get("trainable") != "p-adapter":
        assert result.history[0]["retain"] == pytest.approx(0.0, abs=1e-4), "o' begins as o"
    assert result.history[-1]["loss"] != result.history[0]["loss"]


def test_what_the_frozen_model_makes_of_the_rows_is_kept(options: dict[str, Any], cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training of the same takes it from the disk, bit for bit; under another tail policy, or format, it does not."""
    from uld_offset_models import bridged_target

    asked: list[Any] = []
    really = bridged_target.read_row

    def counted(*given: Any, **more: Any) -> Any:
        asked.append(given[2])
        return really(*given, **more)

    monkeypatch.setattr(bridged_target, "read_row", counted)
    own = shutil.copytree(cached, options["output"].parent / "cache", ignore=shutil.ignore_patterns("bridged-*"))
    made, counts = [], []
    for number, tail in enumerate(["complete", "complete", "truncate", "truncate"]):
        monkeypatch.setattr(bridged_target, "FORMAT", number == 3)
        output = options["output"].parent / str(number)
        made.append(train(**{**options, "cache": str(own), "output": output, "tail": tail, "seed": 5}, objective="npo+gd"))
        counts.append(len(asked))
        assert len(set(asked)) == len(asked), "no row twice"
        asked.clear()
    assert counts[0] == counts[2] == counts[3] > 5
    assert counts[1] == 0
    weights = [result.manifest.files["adapter_model.safetensors"] for result in made]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    folders = list(own.glob("bridged-*"))
    assert len(folders) == 3
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in folders)
    for folder in folders:
        shard = folder / "00000.rows"
        shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ArtifactCorrupt, match=r"bridged-.*00000\.rows"):
        train(**{**options, "cache": str(own), "tail": "truncate"}, objective="npo+gd")


def test_from_the_command_line(options: dict[str, Any], tmp_path: Path) -> None:
    forget, retain = write_rows(tmp_path / "f.jsonl", FORGET), write_rows(tmp_path / "r.jsonl", RETAIN)
    said = ["--base", options["base"], "--forget", forget, "--retain", retain, "-o", tmp_path / "pair", "--steps", 2, "--batch-size", 2]
    said += ["--method", "offset", "--cache", options["cache"], "--device", "cpu"]
    without = CliRunner().invoke(app, ["train", *map(str, said)], prog_name="uld-sdk")
    assert without.exit_code == 2
    assert "made for another tokenizer" in without.stderr
    assert "--target-tokenizer" in without.stderr
    with_it = CliRunner().invoke(
        app, ["train", *map(str, said), "--target-tokenizer", options["target_tokenizer"], "--json"], prog_name="uld-sdk"
    )
    assert with_it.exit_code == 0, with_it.stderr
    assert json.loads(with_it.stdout)
    assert json.loads((tmp_path / "pair" / "uld.json").read_text(encoding="utf-8"))["method"] == "offset"


def test_what_does_not_fit_is_refused(options: dict[str, Any], base: Path, tiny_target: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was made for another tokenizer"):
        train(**{**options, "target_tokenizer": str(base)})
    with pytest.raises(UsageError, match="is for a cache in other tokens") as caught:
        train(**{**options, "base": str(tiny_target)})
    assert "leave it out" in caught.value.hint
    with pytest.raises(UsageError, match="is for a cache in other tokens"):
        train(**{**options, "cache": None, "target": str(tiny_target), "base": str(tiny_target)})
    with pytest.raises(TokenizerMismatch, match="the base has another tokenizer") as mismatch:
        train(**{**options, "cache": None, "target": str(tiny_target), "target_tokenizer": None})
    assert "--target-tokenizer" in mismatch.value.hint
    with pytest.raises(UsageError, match="was made for other data"):
        train(**{**options, "forget": [*FORGET, {"question": "Who else?", "answer": "Nobody."}]})
    lower = tiny.lowering(tiny.tiny_model(tmp_path / "lower", vocab_size=330))
    with pytest.raises(TokenizerMismatch, match="changes every text") as refused:
        train(**{**options, "base": str(lower)})
    assert f"the small model's tokenizer {lower} beside {tiny_target} changes" in str(refused.value)
    assert not options["output"].exists()
