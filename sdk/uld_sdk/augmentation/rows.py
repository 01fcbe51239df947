"""The rows of a set as they were written, with the question and answer that can be augmented, and how they are written again."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uld_adapters.errors import SaveFailed, UsageError
from uld_offset_models.data import Row, normalised, read_rows
from uld_offset_models.sources import Source, records


@dataclass(frozen=True)
class Entry:
    """A row: its fields as they were written, as training reads it, and question and answer unless it is a text or long conversation."""

    record: Mapping[str, Any]
    row: Row
    question: str | None
    answer: str

    def texts(self, *fields: str) -> list[str]:
        """What the row itself gives in some of its fields, each a text or a list of texts."""
        values = [self.record.get(field) for field in fields]
        return [text.strip() for value in values if value for text in (value if isinstance(value, list) else [value])]


def read_entries(source: Source, *, name: str) -> tuple[list[Entry], int]:
    """Read and check a set; the second value counts rows that were left out because the same question and answer came before."""
    rows = read_rows(source, name=name)
    entries: list[Entry] = []
    seen: set[tuple[object, str]] = set()
    for row, (_, record) in zip(rows, records(source, name)[1], strict=True):
        example = row.example
        form = (example.asked, normalised(example.answer))
        if form in seen:
            continue
        seen.add(form)
        single = len(example.messages) == 1 and example.messages[0][0] == "user"
        entries.append(Entry(record, row, example.question if single else None, example.answer))
    return entries, len(rows) - len(entries)


def check_output(path: Path, sources: Sequence[object], *, overwrite: bool, flag: str) -> None:
    """Refuse a name that training could not read, a file that is there already, and one of the other files of the command."""
    if path.suffix not in {".jsonl", ".ndjson"}:
        raise UsageError(f"{path} is not named as JSONL", hint=f"give {flag} a name that ends in .jsonl")
    for source in sources:
        if isinstance(source, str | Path) and Path(source).expanduser().resolve() == path.resolve():
            raise UsageError(f"{path} is named twice in this command", hint=f"choose another {flag}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"{path} already exists", hint=f"choose another {flag}, or add --overwrite")


def write_files(files: Mapping[Path, Sequence[Mapping[str, Any]]]) -> None:
    """Write each file whole beside its name, mode 0600, and rename them all at the end; raises `SaveFailed` and leaves no parts."""
    parts: dict[Path, str] = {}
    try:
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, parts[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                file.flush()
                os.fsync(handle)
        for path in files:
            os.replace(parts.pop(path), path)
    except OSError as error:
        what = error.strerror or str(error)
        raise SaveFailed(
            f"{', '.join(map(str, files))} could not be written: {what}", hint="free some space or choose another -o/--output"
        ) from error
    finally:
        for part in parts.values():
            with suppress(OSError):
                os.unlink(part)
