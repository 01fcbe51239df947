"""Where rows come from: a JSONL, JSON, CSV or Parquet file, a `datasets` folder, a hub data set, or a list of dicts.

A hub data set is named owner/name, owner/name:config or owner/name:config:split (owner/name::split without a configuration); the
split is train unless said otherwise.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_adapters.errors import DataError, MissingExtra

Source = str | Path | Sequence[Mapping[str, Any]]
_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".parquet"}


def records(source: Source, name: str) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
    """The source in words, and its rows as (place, fields); raises `DataError` with file and line."""
    if not isinstance(source, str | Path):
        return f"the {name} set", ((f"{name} row {i}", record) for i, record in enumerate(source, 1))
    path = Path(source).expanduser()
    label = str(source)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{label} has an unknown suffix", hint=f"use one of {', '.join(sorted(_SUFFIXES))}")
        readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
        return label, readers.get(path.suffix, _jsonl)(path)
    if path.suffix in _SUFFIXES or (not path.is_dir() and (path.is_absolute() or label.partition(":")[0].count("/") > 1)):
        raise DataError(f"{label} does not exist", hint="give a file, a datasets folder or a hub name such as owner/name:config:split")
    return label, _datasets(path, label)


def read_text(path: Path, *, as_written: bool = False) -> str:
    """A file's text, without a byte order mark, lines ended by LF or `as_written`; raises `DataError` with the line that is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return text if as_written else text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x})", hint="save the file as UTF-8") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})", hint="one JSON object a line"
                ) from error


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg})", hint="a .json file holds one array of objects") from error
    if not isinstance(value, list):
        raise DataError(f"{path} holds no array", hint="a .json file holds one array of objects; use .jsonl for one object a line")
    yield from ((f"{path} row {number}", record) for number, record in enumerate(value, 1))


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    lines = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for record in lines:
            place = f"{path}:{lines.line_num}"
            if None in record or any(value is None for value in record.values()):
                raise DataError(f"{place}: not as many fields as the header has", hint="quote fields that hold commas or line breaks")
            yield place, {key: _maybe_list(value, place) for key, value in record.items() if value}
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: not valid CSV ({error})", hint="quote fields that hold quotes or line breaks") from error


def _maybe_list(value: str, place: str) -> Any:
    if not value.startswith("[{") and not value.startswith('["'):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: a field that starts as a JSON list is none ({error.msg})", hint="write lists as JSON") from error


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtra("pyarrow", "train") from error
    try:
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not valid Parquet: {str(error).splitlines()[0]}", hint="write the file again") from error
    yield from ((f"{path} row {number}", record) for number, record in enumerate(records, 1))


def _datasets(path: Path, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", "train") from error
    if path.is_dir():
        value = _loaded(label, lambda: datasets.load_from_disk(str(path)))
    else:
        name, config, split = _hub_name(label)
        value = _loaded(label, lambda: datasets.load_dataset(name, config, split=split))
    if isinstance(value, Mapping):
        if "train" not in value:
            raise DataError(
                f"{label} has no split 'train' (it has {', '.join(value)})", hint="save the split you want as a folder of its own"
            )
        value = value["train"]
    yield from ((f"{label} row {number}", record) for number, record in enumerate(value, 1))


def _hub_name(label: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of owner/name:config:split; the split may be a slice such as train[:100]."""
    name, config, split = [*label.split(":", 2), "", ""][:3]
    return name, config or None, split or "train"


def _loaded(label: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises many unrelated classes here
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{label} is neither a data file, a datasets folder nor a hub data set: {what}",
            hint="check the spelling; a hub data set is owner/name, owner/name:config or owner/name:config:split",
        ) from error
