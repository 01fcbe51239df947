"""Seconds until the package is imported and the command line helps, against an interpreter that does nothing."""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 11
LOADED = "import sys, uld_sdk; print(' '.join(name for name in ('torch', 'transformers', 'numpy', 'httpx2') if name in sys.modules))"


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(_work: Path) -> dict[str, Any]:
    """Medians of rounds in which the commands take turns."""
    script = shutil.which("uld-sdk", path=str(Path(sys.executable).parent))
    help_command = [script, "--help"] if script else [sys.executable, "-m", "uld_sdk.cli", "--help"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import uld_sdk": [sys.executable, "-c", "import uld_sdk"],
        "uld-sdk --help": help_command,
    }
    for command in commands.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            taken[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    base = medians["python -c pass"]
    heavy = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout.split()
    return {
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_python": {name: round(value / base, 2) for name, value in medians.items()},
        "import_seconds_beyond_python": round(medians["import uld_sdk"] - base, 4),
        "heavy_modules_loaded_by_import": heavy,
    }
