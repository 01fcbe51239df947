"""Hold-out rows: questions with or without an answer, checked as training rows are, and no training set over again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uld_adapters.errors import DataError, UsageError
from uld_offset_models.data import Row, check_apart, check_row, data_hash
from uld_offset_models.sources import Source, records

_FIELDS = "question (and answer), or messages"
_STAND_IN = "-"  # passes for an answer while the rest of the row is checked


def read_holdout(source: Source, *, option: str) -> list[Row]:
    """Rows of a hold-out; where the remote is to answer itself, `example.answer` is empty.

    Raises `DataError` with file and line, and the option in a note.
    """
    try:
        label, found = records(source, option.removeprefix("--"))
        rows = [_row(record, place) for place, record in found]
        if not rows:
            raise DataError(f"{label} is empty", hint=f"every row holds {_FIELDS}")
    except DataError as error:
        error.add_note(f"  in {option}")
        raise
    return rows


def check_unseen(hashes: Mapping[str, str], trained: Mapping[str, str]) -> None:
    """Refuse a hold-out that is a training set: `hashes` by kind, `trained` as the manifest has them. Raises `UsageError`."""
    for kind, value in hashes.items():
        for name, seen in trained.items():
            if value == seen:
                raise UsageError(
                    f"--{kind}-holdout holds the very {name} set that the assistant was trained on",
                    hint="calibrate on rows that training never saw",
                )


def check_others(sets: Mapping[str, list[Row]], others: Sequence[Source]) -> list[str]:
    """Refuse a hold-out that asks what one of `others` asks, such as the test set of an evaluation; returns the hashes of these.

    Raises `DataError` naming the rows.
    """
    hashes = []
    for source in others:
        rows = read_holdout(source, option="--apart-from")
        for kind, holdout in sets.items():
            check_apart(rows, holdout, names=(str(source) if isinstance(source, str | Path) else "apart_from", f"--{kind}-holdout"))
        hashes.append(data_hash(rows))
    return hashes


def _row(record: Any, place: str) -> Row:
    unanswered = _with_stand_in(record) if isinstance(record, Mapping) else None
    if unanswered is not None:
        return Row(replace(check_row(unanswered, place).example, answer=""))
    row = check_row(record, place)
    if row.example.plain:
        raise DataError(f"{place}: plain text asks nothing", hint=f"every row of a hold-out holds {_FIELDS}")
    return row


def _with_stand_in(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row with something for its answer, where it has none."""
    turns = record.get("messages")
    if turns is not None:
        asks = isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "user"
        return {"messages": [*turns, {"role": "assistant", "content": _STAND_IN}]} if asks else None
    if record.get("question") is not None and record.get("answer") is None:
        return {"question": record["question"], "answer": _STAND_IN}
    return None
