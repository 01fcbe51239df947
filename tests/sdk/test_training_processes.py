"""Two training processes on the CPU (gloo) against one: the same losses and weights, and neither ever waits for the other in vain."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_rows import FORGET, RETAIN, write_rows

STEPS = 6
WORKER = Path(__file__).parent.parent / "two_processes.py"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "gate.safetensors")}


@pytest.fixture(scope="module")
def options(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("rows")
    return {
        "base": str(tiny_target),
        "forget": str(write_rows(data / "forget.jsonl", FORGET)),
        "retain": str(write_rows(data / "retain.jsonl", RETAIN)),
        "steps": STEPS,
        "batch_size": 4,
        "rank": 4,
        "lora_alpha": 4,
        "weight_decay": 0.01,
        "schedule": "linear",
        "device": "cpu",
        "dtype": "float32",
        "progress": False,
    }


@pytest.fixture(scope="module")
def both(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of the artifacts, and what rank 0 and rank 1 told of each scenario."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "options.json").write_text(json.dumps(options), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(folder / "options.json"), str(folder)]
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        told = [worker.communicate(timeout=150)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(told)
    first, second = (json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    return folder, first, second


@pytest.fixture(scope="module")
def alone(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from uld_sdk.training import train

    return train(**options, output=tmp_path_factory.mktemp("one") / "assistant")


def test_losses_and_weights_are_those_of_one_process(alone: Any, both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, first, second = both
    assert first["plain"] == second["plain"]
    for name in ("remember", "uniform", "loss"):
        mine = [entry[name] for entry in first["plain"]["history"]]
        assert mine == pytest.approx([entry[name] for entry in alone.history], abs=1e-5)
    assert first["plain"]["losses"] == pytest.approx(alone.manifest.losses, abs=1e-5)
    for name in ("forget_untouched", "retain_untouched"):
        assert first["plain"]["history"][-1][name] == alone.history[-1][name]
    expected = weights(alone.path)
    assert all(torch.allclose(value, expected[name], atol=1e-4, rtol=0) for name, value in weights(folder / "plain").items())


def test_a_pair_trains_in_two_processes_as_in_one(
    options: dict[str, Any], both: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    from uld_sdk.training import train

    folder, first, second = both
    assert first["pair"] == second["pair"]
    one = train(**options, method="offset", target=options["base"], gate=True, margin=50.0, output=tmp_path / "pair")
    for name in ("forget", "retain", "loss"):
        mine = [entry[name] for entry in first["pair"]["history"]]
        assert mine == pytest.approx([entry[name] for entry in one.history], abs=1e-4)
    expected = weights(one.path)
    assert all(torch.allclose(value, expected[name], atol=1e-3, rtol=0) for name, value in weights(folder / "pair").items())


def test_rank_0_has_the_clock(both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, first, second = both
    assert first["fast_follower"] == second["fast_follower"]
    assert first["fast_follower"]["steps"] == STEPS
    assert first["fast_leader"] == second["fast_leader"]
    assert first["fast_leader"]["steps"] == 1


def test_ctrl_c_in_one_process_ends_both_and_they_resume(both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, first, second = both
    for told in (first, second):
        assert told["interrupted"]["error"] == "TrainingError"
        assert "interrupted after 3 of 6 steps" in told["interrupted"]["message"]
        assert told["interrupted"]["code"] == 130
        assert told["resumed"]["steps"] == STEPS
    expected = weights(folder / "plain")
    assert all(torch.allclose(value, expected[name], atol=1e-6, rtol=0) for name, value in weights(folder / "interrupted").items())


@pytest.mark.parametrize(("scenario", "error", "words"), [("diverged", "TrainingDiverged", "not finite"), ("full", "SaveFailed", "full")])
def test_what_ends_one_process_ends_both(scenario: str, error: str, words: str, both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, first, second = both
    assert first[scenario] == second[scenario]
    assert first[scenario]["error"] == error
    assert words in first[scenario]["message"]
    assert not (folder / scenario).exists()


def test_a_callers_error_in_rank_0_reaches_the_other(both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, first, second = both
    assert first["display"] == {"error": "RuntimeError", "message": "a display that fails"}
    assert second["display"]["error"] == "TrainingError"
    assert "a display that fails" in second["display"]["message"]


def test_the_command_speaks_once(both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, first, second = both
    assert json.loads(first["cli"]["stdout"])["path"] == str(folder / "cli")
    assert second["cli"]["stdout"] == ""
    assert [told["cli"]["code"] for told in (first, second)] == [0, 0]
