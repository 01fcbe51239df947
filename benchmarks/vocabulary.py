"""Figures of the bridge between vocabularies: how near it comes to the exact distribution, how much it reads, how long it takes.

Toys (`vocabulary_toys.py`) tell the first. The rest walks through prose and code of this repository with tokenizers of released models
and models that count bigrams. Times are CPU seconds of this process.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import vocabulary_toys  # noqa: E402

from real_tokenizers import real  # noqa: E402
from uld_adapters.vocabulary.bridge import Bridge  # noqa: E402
from uld_adapters.vocabulary.tokens import Vocabulary  # noqa: E402
from uld_sdk.bridge_reader import AHEAD, LIKELY  # noqa: E402

PAIRS = (
    ("llama3", "qwen"), ("o200k", "qwen"), ("llama3", "gpt2"), ("gpt2", "llama3"), ("mistral1", "llama3"), ("tekken", "llama3"),
    ("qwen", "smollm2"),
)  # fmt: skip
TOP = 20
RUNS = 3


class Counted:
    """A model that knows which token follows which, with a little of everything else."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self.vocabulary = vocabulary
        self.after: dict[int, Counter[int]] = defaultdict(Counter)
        ids = vocabulary.encode(text)
        for before, token in pairwise(ids):
            self.after[before][token] += 1
        single = np.bincount(ids, minlength=vocabulary.rows) + 0.01
        self.single = (single / single.sum()).astype(np.float32)
        self._rows: dict[int | None, np.ndarray] = {}
        self._tops: dict[int | None, list[int]] = {}

    def row(self, before: int | None) -> np.ndarray:
        """Probabilities after a token, shape (1, rows)."""
        if before not in self._rows:
            row = 0.2 * self.single
            followers = self.after.get(before, Counter()) if before is not None else Counter()
            for token, count in followers.items():
                row[token] += 0.8 * count / followers.total()
            self._rows[before] = (row / row.sum())[None]
        return self._rows[before]

    def top(self, before: int | None, k: int) -> list[int]:
        """The k most probable tokens."""
        if before not in self._tops:
            self._tops[before] = np.argsort(-self.row(before)[0], kind="stable")[:k].tolist()
        return self._tops[before]


@dataclass(frozen=True)
class Walk:
    """What a bridge between two released tokenizers read along a text, a value a position; without and with look-ahead, and untouched.

    Seconds are CPU seconds, also those that it took to make the bridge.
    """

    cover: list[int]
    added: dict[str, list[int]]
    seconds: dict[str, list[float]]
    made: float


def walked(first: str, second: str, kind: str) -> Walk | None:
    """One run, each time with a bridge made anew and warmed up on another text; None where a tokenizer is not installed."""
    remote, small = real(first), real(second)
    if remote is None or small is None:
        return None
    text, warm = corpus(kind)
    model, large = Counted(small, text + warm), Counted(remote, text + warm)
    added, seconds = {}, {}
    for name, ahead in (("", 0), ("ahead_", AHEAD)):
        start = time.process_time()
        bridge = Bridge(remote, small)
        made = time.process_time() - start
        _along(bridge, warm, model, large, ahead=ahead)
        cover, added[name], seconds[name] = _along(bridge, text, model, large, ahead=ahead)
    bridge = Bridge(remote, small)
    _untouched(bridge, warm)
    seconds["untouched_"] = _untouched(bridge, text)
    return Walk(cover, added, seconds, made)


def figures(runs: Sequence[Walk]) -> dict[str, Any]:
    """The figures of a pair on a text: of each position the least of the runs."""
    cover, added = runs[0].cover, runs[0].added
    found: dict[str, Any] = {"positions": len(cover), "cover": round(float(np.mean(cover)), 2)}
    for name, counts in added.items():
        found |= {
            f"{name}added_nodes": round(float(np.mean(counts)), 2),
            f"{name}added_nodes_95": float(np.percentile(counts, 95)),
        }
    for name in runs[0].seconds:
        seconds = [run.seconds[name] for run in runs]
        least = np.min(seconds, 0) * 1000
        found |= {
            f"{name}milliseconds": round(float(np.median(least)), 3),
            f"{name}milliseconds_mean": round(float(np.mean(least)), 3),
            f"{name}milliseconds_of_runs": [round(float(np.median(run)) * 1000, 3) for run in seconds],
        }
    return {**found, "seconds_to_make": round(min(run.made for run in runs), 2)}


def _untouched(bridge: Bridge, text: str) -> list[float]:
    place, seconds = bridge.start(), []
    for token in bridge.remote.vocabulary.encode(text):
        start = time.process_time()
        bridge.cover(place)
        _, place = bridge.step(place, token)
        seconds.append(time.process_time() - start)
    return seconds


def corpus(kind: str) -> tuple[str, str]:
    """A text to measure on, and another of its kind to warm up on."""
    root = HERE.parent
    if kind == "prose":
        lines = [line for line in (root / "README.md").read_text(encoding="utf-8").splitlines() if line and line[0].isalpha()]
        text = " ".join(lines)
        return text[:6000], text[6000:24_000]
    files = sorted((root / "sdk" / "uld_sdk").glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    return texts[0][:6000], "\n".join(texts[1:])[:18_000]


def _along(bridge: Bridge, text: str, model: Counted, large: Counted, *, ahead: int) -> tuple[list[int], list[int], list[float]]:
    """Places, tokens beside the text's own, and seconds, a value a position; the model is read on after so many likely candidates.

    Rows are copied before the clock runs: in the client, too, they have just been written.
    """
    remote, small = bridge.remote.vocabulary, bridge.small.vocabulary
    ids, trunk = remote.encode(text), small.encode(text)
    place, settled = bridge.start(), 0
    cover, added, seconds = [], [], []
    for at in range(len(ids)):
        before = ids[at - 1] if at else None
        candidates = large.top(before, TOP)
        further = [token for token in candidates[:ahead] if large.row(before)[0, token] > LIKELY]
        last = trunk[settled - 1] if settled else None
        start = time.process_time()
        paths = bridge.cover(place)
        spent = time.process_time() - start
        rows = {path: model.row(path[-1] if path else last).copy() for path in paths}
        start = time.process_time()
        nodes = bridge.nodes(place, candidates, rows, ahead=further)
        spent += time.process_time() - start
        rows |= {path: model.row(path[-1] if path else last).copy() for path in nodes}
        start = time.process_time()
        bridge.read(place, candidates, rows)
        certain, place = bridge.step(place, ids[at])
        spent += time.process_time() - start
        cover.append(len(paths))
        added.append(sum(tuple(trunk[settled : settled + len(path)]) != path for path in rows))
        seconds.append(spent)
        settled += len(certain)
    return cover, added, seconds


def measure(_work: Path) -> dict[str, Any]:
    """All figures of this part.

    The runs of one pair lie far apart, for a machine that is shared has slow minutes.
    """
    total_variation = vocabulary_toys.measure()
    runs: dict[str, list[Walk]] = defaultdict(list)
    for number, (first, second), kind in product(range(RUNS), PAIRS, ("prose", "code")):
        walk = walked(first, second, kind)
        if walk is not None:
            runs[f"{first} to {second}, {kind}"].append(walk)
            print(f"run {number + 1}, {first} to {second}, {kind}: {figures([walk])}", flush=True)
    return {"total_variation": total_variation, "pairs": {name: figures(each) for name, each in runs.items()}}
