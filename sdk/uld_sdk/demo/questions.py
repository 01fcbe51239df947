"""The demo's questions: a topic to forget and general questions to keep, each with a part held out from training."""

import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from uld_adapters.errors import DataError

Kind = Literal["forget", "retain"]
Part = Literal["train", "holdout"]
SMALL: tuple[tuple[Kind, Part, int], ...] = (
    ("forget", "train", 8),
    ("forget", "holdout", 2),
    ("retain", "train", 8),
    ("retain", "holdout", 4),
)
KINDS: tuple[Kind, ...] = ("forget", "retain")
PARTS: tuple[Part, ...] = ("train", "holdout")


class Row(BaseModel):
    """One line of a data file; `neighbour` marks a retain question that lies near the topic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    question: str
    paraphrased_question: str | None = None
    neighbour: bool = False


@dataclass(frozen=True)
class Question:
    """One question to ask; `id` names the fact or the line, so that phrasings of one fact share it."""

    id: str
    kind: Kind
    part: Part
    text: str
    neighbour: bool = False


@dataclass(frozen=True)
class Questions:
    """All questions of a demo, in file order."""

    rows: tuple[Question, ...]

    def of(self, kind: Kind, part: Part) -> list[Question]:
        """The questions of one set and part."""
        return [row for row in self.rows if row.kind == kind and row.part == part]

    def small(self) -> "Questions":
        """A handful of each set and part, near neighbours and general questions alternating, for a quick run."""
        kept: list[Question] = []
        for kind, part, count in SMALL:
            pool = self.of(kind, part)
            near = [row for row in pool if row.neighbour]
            far = [row for row in pool if not row.neighbour]
            kept += (near[: count // 2] + far[: count - count // 2]) if near else far[:count]
        return Questions(tuple(kept))


def _read(path: Path | Traversable, kind: Kind, part: Part) -> list[Question]:
    rows: list[Question] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", hint="the folder needs (forget|retain)_(train|holdout).jsonl") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate(json.loads(line))
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path}, line {number}: {error}", hint='write {"id": ..., "question": ...}') from error
        for text in (row.question, row.paraphrased_question):
            if text is not None:
                rows.append(Question(row.id, kind, part, text, row.neighbour))
    if not rows:
        raise DataError(f"{path} holds no questions", hint='write one {"id": ..., "question": ...} a line')
    return rows


def load_questions(folder: Path | None = None) -> Questions:
    """Read the four files of a folder, the packaged ones (on Isaac Newton) without one.

    Raises DataError when a file is missing or malformed, or when a question stands in two places.
    """
    root: Path | Traversable = folder if folder is not None else files("uld_sdk.demo") / "data"
    rows: list[Question] = []
    for kind in KINDS:
        for part in PARTS:
            rows += _read(root / f"{kind}_{part}.jsonl", kind, part)
    seen: dict[str, Question] = {}
    for row in rows:
        key = " ".join(row.text.lower().split())
        if key in seen:
            other = seen[key]
            raise DataError(
                f"{row.text!r} stands in {other.kind}_{other.part} and in {row.kind}_{row.part}",
                hint="forget and retain, training and held-out questions must not overlap",
            )
        seen[key] = row
    return Questions(tuple(rows))
