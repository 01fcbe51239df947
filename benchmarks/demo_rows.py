"""The demo's model and training rows, for the parts that train on them."""

from pathlib import Path
from typing import Any

from uld_sdk.demo.job import Stage, set_stage, training_rows
from uld_sdk.demo.plain import PlainAnswer


def say(line: str) -> None:
    """Progress, indented."""
    print(f"  {line}", flush=True)


def begin(work: Path) -> tuple[Stage, dict[str, PlainAnswer]]:
    """The demo's model and its own answers."""
    stage = set_stage(output=work, data=None, small=False, steps=None, max_seconds=None, on_line=say)
    return stage, stage.own_answers(work)


def rows(stage: Stage, own: dict[str, PlainAnswer]) -> dict[str, list[Any]]:
    """The training rows of both sets."""
    return {kind: training_rows(stage.questions, own, kind) for kind in ("forget", "retain")}
