"""What a training step of each method costs, each in a process of its own: `python benchmarks/run.py steps`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo_rows import begin, rows, say

METHODS = ("uld", "direct", "offset", "offset-gated")


def measure(work: Path) -> dict[str, Any]:
    """The figures of each method, on the demo's rows and what its server says of them."""
    from uld_sdk.demo.pairs import cache_rows

    folder = work / "offset"
    stage, own = begin(folder)
    cache_rows(stage, own, folder=folder / "cache", top_logprobs=20)
    file = folder / "rows.json"
    file.write_text(json.dumps(rows(stage, own)), encoding="utf-8")
    found = []
    for method in METHODS:
        words = [method, "--rows", file, "--model", stage.model, "--cache", folder / "cache"]
        command = [sys.executable, str(Path(__file__).with_name("training_step.py")), *map(str, words)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
        say(str(found[-1]))
    return {"steps": found}
