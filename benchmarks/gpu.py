"""The small model on a CUDA device against the CPU: `python benchmarks/gpu.py [--steps 40] [--repeats 20]` (make bench-gpu).

Two figures a device, both on SmolLM2-135M as the demo uses it: milliseconds of one verification pass over a draft of 64 tokens for 1 and 8
texts at a time, and seconds a training step. Writes benchmarks/gpu.json; without a CUDA device it says so and exits 1.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from uld_offset_models.loading import load_artifact
from uld_offset_models.scorer import Scorer
from uld_offset_models.track import Track
from uld_sdk import train
from uld_sdk.demo.questions import load_questions
from uld_sdk.demo.server import packaged_model

HERE = Path(__file__).resolve().parent
PROMPT, DRAFT = 64, 64  # tokens
BATCHES = (1, 8)  # texts at a time


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, with the device's queue emptied before the clock is read."""
    spent = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(1000.0 * (time.perf_counter() - begin))
    return statistics.median(spent[2:])


def rows(kind: str) -> list[dict[str, str]]:
    """The demo's questions with a stock answer: a step costs the same whatever the words."""
    answer = "This is a sentence of about the length that the model itself would give as the answer to such a question."
    return [{"question": question.text, "answer": answer} for question in load_questions().of(kind, "train")]  # type: ignore[arg-type]


def measure(device: str, *, steps: int, repeats: int, work: Path) -> dict[str, Any]:
    """The figures of one device."""
    print(f"{device}: {steps} training steps", flush=True)
    settings = {"base": str(packaged_model()), "layers": 6, "steps": steps, "device": device, "dtype": "float32", "holdout": 0.0}
    trained = train(forget=rows("forget"), retain=rows("retain"), output=work / device, progress=False, **settings)
    scorer = Scorer(load_artifact(trained.path, device=device).model)
    figures: dict[str, Any] = {"seconds_a_step": trained.seconds / trained.manifest.steps}
    ids = list(range(100, 100 + PROMPT + DRAFT))
    for batch in BATCHES:
        tracks = [Track() for _ in range(batch)]
        scorer.read([(track, ids[:PROMPT]) for track in tracks])

        def verify(tracks: list[Track] = tracks) -> None:
            for track in tracks:
                track.rollback(PROMPT)
            scorer.read([(track, ids[PROMPT:]) for track in tracks])

        figures[f"milliseconds_a_draft_of_{DRAFT}_for_{batch}"] = milliseconds(verify, device, repeats)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"bench-gpu: torch {torch.__version__} sees no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        devices = ("cpu", "cuda")
        figures = {device: measure(device, steps=arguments.steps, repeats=arguments.repeats, work=Path(folder)) for device in devices}
    report = {"command": "make bench-gpu TORCH=default", "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    (HERE / "gpu.json").write_text(json.dumps({**report, "figures": figures}, indent=2) + "\n", encoding="utf-8")
    for name in figures["cpu"]:
        slow, fast = figures["cpu"][name], figures["cuda"][name]
        print(f"{name}: cpu {slow:.3g}, cuda {fast:.3g}, ratio {slow / fast:.1f}")


if __name__ == "__main__":
    main()
