"""The main job on one machine: train an assistant, serve a real model with llama.cpp, unlearn a topic through HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(
    *,
    output: str | Path = "runs/demo",
    top_logprobs: int = 20,
    method: str = "uld",
    preset: str = "gated",
    max_seconds: float | None = None,
    steps: int | None = None,
    open_report: bool = False,
    data: str | Path | None = None,
    small: bool = False,
    on_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo, write `report.json` and `report.html` under `output`, and return the report.

    With method "offset" a pair is trained, plain and gated, towards npo+kl, and compared with the assistant of the preset gated; the
    report shows the answers of the gated one. `data` is a folder with forget_train, forget_holdout, retain_train and
    retain_holdout.jsonl of one's own topic; `small` takes a few rows and steps only; `on_line` receives each line of progress.
    """
    asked: dict[str, Any] = {
        "output": Path(output),
        "top_logprobs": top_logprobs,
        "max_seconds": max_seconds,
        "steps": steps,
        "open_report": open_report,
        "data": None if data is None else Path(data),
        "small": small,
        "on_line": on_line,
    }
    if method == "offset":
        from uld_sdk.demo.pairs import run_pairs

        return run_pairs(**asked)
    from uld_sdk.demo.job import run_demo

    return run_demo(preset=preset, **asked)
