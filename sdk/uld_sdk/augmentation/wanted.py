"""What an augmentation is asked for, checked before anything is read or sent, and what came of it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from uld_adapters.errors import UsageError
from uld_sdk.augmentation.tasks import Task

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How many texts of each kind a row, and how they are asked for."""

    paraphrases: int = 2
    wrong: int = 2
    neighbours: int = 0
    seed: int = 0
    tries: int = 3
    temperature: float = 0.8
    max_new_tokens: int = 256
    concurrency: int = 8

    def __post_init__(self) -> None:
        lowest = {"paraphrases": 0, "wrong": 0, "neighbours": 0, "seed": 0, "tries": 1, "max_new_tokens": 1, "concurrency": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is {value!r}", hint=f"pass {name} as a whole number, {least} or more")
        if self.seed > LARGEST_SEED:
            raise UsageError(f"seed is {self.seed}", hint="give a whole number from 0 to 2**32 - 1")
        if not isinstance(self.temperature, int | float) or not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature!r}", hint="give more than 0: what is asked again must come out differently")

    @property
    def nothing(self) -> bool:
        """Whether no text is to be found at all."""
        return not (self.paraphrases or self.wrong or self.neighbours)


@dataclass(frozen=True)
class Count:
    """Of one kind of text: how many were wanted and kept, how many are left out, and how often a check refused one, by reason."""

    wanted: int
    kept: int
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """How many could not be had within the tries."""
        return self.wanted - self.kept

    @classmethod
    def of(cls, tasks: Iterable[Task]) -> "Count":
        """The sum of some tasks."""
        listed = list(tasks)
        refused: Counter[str] = Counter()
        for task in listed:
            refused.update(task.refused)
        return cls(sum(task.wanted for task in listed), sum(len(task.kept) for task in listed), dict(sorted(refused.items())))


@dataclass(frozen=True)
class AugmentResult:
    """A finished augmentation: the files, their rows, and what was found of each kind of text.

    `as_they_were` rows are texts and conversations, which are written as they came; `duplicates` are input rows left out.
    `asked` replies came from the server in this run, `cached` from the cache.
    """

    path: Path
    retain_path: Path | None
    rows: int
    retain_rows: int
    as_they_were: int
    duplicates: int
    counts: Mapping[str, Count]
    asked: int
    cached: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of all of it."""
        counts = {kind: {**asdict(count), "left_out": count.left_out} for kind, count in self.counts.items()}
        retain = None if self.retain_path is None else str(self.retain_path)
        return {**asdict(self), "path": str(self.path), "retain_path": retain, "counts": counts}
