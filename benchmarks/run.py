"""The figures of benchmarks/README.md: `python benchmarks/run.py [PART ...]`, all parts without a name.

Each part writes benchmarks/<part>.json, with the command and the machine, and the tables of benchmarks/README.md are made anew
from all parts that have been run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "runs" / "bench"
MODULES = {
    "startup": "startup", "demo": "demo_figures", "latency": "latency", "offset": "offset", "gradients": "top_k_gradients",
    "steps": "training_steps", "artifacts": "artifacts", "vocabulary": "vocabulary", "retokenised": "retokenised",
}  # fmt: skip
PARTS = ("training", *MODULES)


def machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def run_part(name: str) -> dict[str, Any]:
    """One part in this process; the training comparison is a script of its own."""
    sys.path.insert(0, str(HERE))
    if name in MODULES:
        return dict(import_module(MODULES[name]).measure(WORK))
    target = HERE / "training.json"
    subprocess.run([sys.executable, str(HERE / "training_speed.py")], check=True)
    return json.loads(target.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none means all")
    parts = parser.parse_args().parts
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    for name in parts or PARTS:
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        figures = run_part(name)
        figures |= {
            "command": f"python benchmarks/run.py {name}",
            "machine": machine(),
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        (HERE / f"{name}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote benchmarks/{name}.json after {figures['seconds']:.0f} s", flush=True)
    import tables

    tables.write(HERE)


if __name__ == "__main__":
    main()
