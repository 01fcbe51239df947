"""One training step of each method on the demo's target and rows: `python benchmarks/training_step.py METHOD`, each one of `run.py steps`.

Each method runs in a process of its own, for the peak of its memory: seconds a step (median; with reading its rows and what the
cache has of them), the peak of the process in MiB, and FLOPs a step (matrix products and attention, backward passes included: as
torch counts them, and two kinds of operation that its counter does not know).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from training_steps import METHODS

from uld_offset_models.assistant import Gate, load_base
from uld_offset_models.data import read_rows
from uld_offset_models.encoding import encode
from uld_offset_models.goal import Goal
from uld_offset_models.lessons import Lessons, Reference
from uld_offset_models.network import build_assistant
from uld_offset_models.offset import OffsetPair
from uld_offset_models.offset_lessons import OffsetLessons
from uld_offset_models.steps import Steps
from uld_offset_models.target_cache import TargetCache
from uld_offset_models.target_side import CachedTarget
from uld_offset_models.tuned import Tuned, make_trainable
from uld_offset_models.white_box import build_white_box

LAYERS = 6  # of the assistant, as in the demo
GOAL = Goal("npo", "kl")


Shape = tuple[int, ...]


def _addmm(_: Shape, first: Shape, second: Shape, **__: Any) -> int:
    return 2 * first[0] * first[1] * second[1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


UNCOUNTED = {
    torch.ops.aten.addmm_: _addmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def built(method: str, model: Path, rows: dict[str, list[Any]], cache: Path, steps: int) -> tuple[Any, Any]:
    """The module in training and the steps that it sees; what is constant has been computed by then."""
    base, tokenizer = load_base(model, layers=LAYERS if method == "uld" else None)
    forget, retain = (
        encode(tokenizer, [row.example for row in read_rows(rows[kind], name=kind)], chat_template=True, max_length=1024)
        for kind in ("forget", "retain")
    )
    dealt = Steps(forget, retain, batch=8, seed=0, first=0, last=steps)
    if method == "uld":
        return build_assistant(base, tokenizer, rank=32, lora_alpha=32, gate=True, seed=0), dealt
    lora = {"trainable": "lora", "rank": 32, "lora_alpha": 32, "seed": 0}
    if method == "direct":
        box = build_white_box(base, tokenizer, goal=GOAL, beta=0.1, autocast=False, **lora)
        reference = box.reference(*Lessons(dealt, GOAL, {}, Reference()).rows())
        return box, Lessons(dealt, GOAL, {}, reference)
    states = Tuned(base, tokenizer, trainable="full", autocast=False).states([*forget, *retain])
    side = CachedTarget(TargetCache.open(cache).find, tail="complete", vocabulary=len(tokenizer))
    gate = Gate(base.config.hidden_size, bias=0.0) if method == "offset-gated" else None
    pair = OffsetPair(
        make_trainable(base, **lora), tokenizer, goal=GOAL, beta=0.1, alpha=1.0, gate=gate, target=side, states=states,
        trainable="lora", autocast=False,
    )  # fmt: skip
    return pair, OffsetLessons(dealt, GOAL, {}, side, states)


def one(method: str, model: Path, rows: dict[str, list[Any]], cache: Path, *, steps: int) -> dict[str, Any]:
    """The figures of one method."""
    trainee, dealt = built(method, model, rows, cache, steps + 1)
    optimizer = torch.optim.AdamW(trainee.trained().values(), lr=1e-4)
    seconds, flops = [], 0
    for index in range(steps + 1):
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        begin = time.perf_counter()
        lesson = dealt[index]
        with counter if index == 0 else torch.enable_grad():
            first, second = trainee(lesson)
            (first + second).backward()
        if index == 0:
            flops = counter.get_total_flops()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)
    return {"method": method, "seconds": round(statistics.median(seconds[1:]), 3), "peak_mib": round(peak), "gflops": round(flops / 1e9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: {forget: [...], retain: [...]}")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    asked = parser.parse_args()
    rows = json.loads(asked.rows.read_text(encoding="utf-8"))
    print(json.dumps(one(asked.method, asked.model, rows, asked.cache, steps=asked.steps)))


if __name__ == "__main__":
    main()
