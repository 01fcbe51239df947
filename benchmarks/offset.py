"""Delta-unlearning: the demo's pairs beside ULD, gradients from a top-k cache, and what a training step costs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import top_k_gradients
import training_step

from uld_sdk.demo import pairs
from uld_sdk.demo.job import Stage, set_stage, training_rows
from uld_sdk.demo.plain import PlainAnswer

HERE = Path(__file__).resolve().parent


def say(line: str) -> None:
    """Progress, indented."""
    print(f"  {line}", flush=True)


def begin(work: Path) -> tuple[Stage, dict[str, PlainAnswer]]:
    """The demo's model and rows."""
    stage = set_stage(output=work, data=None, small=False, steps=None, max_seconds=None, on_line=say)
    return stage, stage.own_answers(work)


def rows(stage: Stage, own: dict[str, PlainAnswer]) -> dict[str, list[Any]]:
    """The training rows of both sets."""
    return {kind: training_rows(stage.questions, own, kind) for kind in ("forget", "retain")}


def measure(work: Path) -> dict[str, Any]:
    """All three parts; what the server says of the rows is cached once."""
    report = pairs.run_pairs(
        output=work / "offset", top_logprobs=20, max_seconds=None, steps=None, open_report=False, data=None, small=False,
        on_line=say,
    )  # fmt: skip
    stage, own = begin(work / "offset")
    data = rows(stage, own)
    return {
        "compared": report["compared"],
        "gradients": top_k_gradients.measure(stage.model, data),
        "steps": steps(stage.model, data, work / "offset"),
    }


def steps(model: Path, data: dict[str, list[Any]], folder: Path) -> list[dict[str, Any]]:
    """The figures of each method's training step, each from a process of its own."""
    file = folder / "rows.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    found = []
    for method in training_step.METHODS:
        words = [method, "--rows", file, "--model", model, "--cache", folder / "cache"]
        command = [sys.executable, str(HERE / "training_step.py"), *map(str, words)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
        print(f"  {found[-1]}", flush=True)
    return found
