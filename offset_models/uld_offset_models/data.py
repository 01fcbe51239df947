"""Forget and retain sets: read from any source, checked row by row, and widened to the paper's D'_f and D'_r."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from uld_adapters.errors import DataError
from uld_offset_models.sources import Source, records

_FIELDS = "question and answer, or messages, or text"


@dataclass(frozen=True)
class Example:
    """One thing to learn: `messages` before the answer (empty for plain text), the answer, and where it was written."""

    messages: tuple[tuple[str, str], ...]
    answer: str
    place: str
    plain: bool = False

    @property
    def question(self) -> str:
        """The last message before the answer, or the text itself."""
        return self.messages[-1][1] if self.messages else self.answer

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """All that stands before the answer, normalised (of plain text the text itself): what two sets are compared by."""
        return tuple((role, normalised(content)) for role, content in self.messages or (("", self.answer),))


@dataclass(frozen=True)
class Row:
    """A checked row: its own example, the same asked or answered in other words, and wrong answers to its question."""

    example: Example
    paraphrases: tuple[Example, ...] = ()
    perturbed: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Sets:
    """What training sees: `forget` is D'_f (with paraphrases), `retain` D'_r (with perturbed wrong answers), `holdout` stays out."""

    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    holdout: tuple[Example, ...]


def read_rows(source: Source, *, name: str = "rows") -> list[Row]:
    """Read a JSONL, JSON, CSV or Parquet file, a `datasets` folder, a hub name or a list of dicts; raises `DataError` with the line."""
    label, found = records(source, name)
    rows = [check_row(record, place) for place, record in found]
    if not rows:
        raise DataError(f"{label} is empty", hint=f"every row holds {_FIELDS}")
    return rows


def build_sets(forget: list[Row], retain: list[Row], *, holdout: float = 0.0, seed: int = 0) -> Sets:
    """D'_f = forget + paraphrases, D'_r = retain + paraphrases + forget questions with wrong answers, less a seeded hold-out of retain.

    Raises `DataError` when the same is asked in both sets.
    """
    import numpy as np

    check_overlap(forget, retain)
    order = np.random.default_rng((seed, 3)).permutation(len(retain))
    count = min(max(1, round(holdout * len(retain))), len(retain) - 1) if holdout > 0 else 0
    out = {int(i) for i in order[:count]}
    kept = [row for i, row in enumerate(retain) if i not in out]
    return Sets(
        forget=tuple(e for row in forget for e in (row.example, *row.paraphrases)),
        retain=tuple(e for row in kept for e in (row.example, *row.paraphrases)) + tuple(e for row in forget for e in row.perturbed),
        holdout=tuple(retain[i].example for i in sorted(out)),
    )


def check_overlap(forget: list[Row], retain: list[Row]) -> None:
    """What is asked in both sets would be remembered and flattened at once; the error lists the first such rows.

    Paraphrases count on both sides. Conversations are compared whole: the same last words after others are another question.
    """
    check_apart(forget, retain, names=("the forget set", "the retain set"))


def check_apart(first: list[Row], second: list[Row], *, names: tuple[str, str]) -> None:
    """Raise `DataError` naming the first rows of `second` that `first` asks, too."""
    places = {e.asked: e.place for row in first for e in (row.example, *row.paraphrases)}
    doubles = ([e for e in (row.example, *row.paraphrases) if e.asked in places] for row in second)
    clashes = [(places[found[0].asked], found[0]) for found in doubles if found]
    if clashes:
        shown = "; ".join(f"{there} and {e.place}: {e.question[:60]!r}" for there, e in clashes[:3])
        raise DataError(f"{names[0]} overlaps {names[1]} in {len(clashes)} rows: {shown}", hint="take these rows out of one of the sets")


def normalised(text: str) -> str:
    """Lower case, words only: the form in which questions are compared."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows' content, whatever file they came in."""
    digest = hashlib.sha256()
    for row in rows:
        for e in (row.example, *row.paraphrases, *row.perturbed):
            digest.update(json.dumps([e.messages, e.answer], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def check_row(record: Any, place: str) -> Row:
    """One row out of its fields, checked; `place` names it in the `DataError`."""
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: not an object", hint=f"every row holds {_FIELDS}")
    if record.get("messages") is not None:
        return Row(_conversation(record["messages"], place))
    if record.get("question") is not None or record.get("answer") is not None:
        return _question(record, place)
    if record.get("text") is not None:
        return Row(Example((), _filled(record, "text", place), place, plain=True))
    raise DataError(f"{place}: missing fields (found {', '.join(map(str, record)) or 'none'})", hint=f"every row holds {_FIELDS}")


def _question(record: Mapping[str, Any], place: str) -> Row:
    question, answer = _filled(record, "question", place), _filled(record, "answer", place)

    def example(asked: str, answered: str) -> Example:
        return Example((("user", asked),), answered, place)

    asked = [*_many(record, "paraphrased_question", place), *_many(record, "paraphrased_questions", place)]
    answered = _many(record, "paraphrased_answer", place)
    return Row(
        example(question, answer),
        tuple(example(q, answer) for q in asked) + tuple(example(question, a) for a in answered),
        tuple(example(question, a) for a in _many(record, "perturbed_answer", place)),
    )


def _conversation(value: Any, place: str) -> Example:
    hint = 'messages is a list of {"role": ..., "content": ...} that ends with the assistant'
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise DataError(f"{place}: messages is not a list of objects", hint=hint)
    turns = tuple((str(m.get("role", "")), _filled(m, "content", place)) for m in value)
    if len(turns) < 2 or turns[-1][0] != "assistant" or any(role not in {"system", "user", "assistant"} for role, _ in turns):
        raise DataError(f"{place}: messages needs a question, then the assistant's answer", hint=hint)
    return Example(turns[:-1], turns[-1][1], place)


def _filled(record: Mapping[str, Any], field: str, place: str) -> str:
    value = record.get(field)
    if value is None:
        raise DataError(f"{place}: missing field {field!r}", hint=f"every row holds {_FIELDS}")
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{place}: empty {field}" if value == "" or isinstance(value, str) else f"{place}: {field} is not text",
            hint="fill it or drop the row",
        )
    return value.strip()


def _many(record: Mapping[str, Any], field: str, place: str) -> list[str]:
    value = record.get(field)
    if value is None or value == "" or value == []:
        return []
    return [_filled({field: v}, field, place) for v in (value if isinstance(value, list) else [value])]
