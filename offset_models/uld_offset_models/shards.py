"""Append-only shards: records on disk, each found by its key through a memory map.

A shard is a file of records: magic, key, length, CRC-32, whether the payload is deflated, and the payload. A record counts once it is
there whole, so that whatever ends a process costs at most the record in the making. A full shard is sealed: its SHA-256 goes into the
manifest beside it.
"""

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uld_adapters.errors import ArtifactCorrupt
from uld_offset_models.manifest import Frozen
from uld_offset_models.saving import save_failed

KEY = 16  # bytes
ROWS, BYTES = 256, 8 << 20  # a shard is sealed when it holds so many records, or bytes
_MAGIC = b"uldr"
_HEADER = struct.Struct(f"<4s{KEY}sIIB3x")
_REDO = "delete this file and run the same command again: only its rows are made anew"
GO_ON = "free some space and run the same command again: it goes on from there"


class Seal(Frozen):
    """A finished shard: file name, number of records, SHA-256."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class _Place:
    shard: int
    start: int
    size: int
    deflated: bool


_Record = tuple[bytes, int, int, bool]  # key, start and size of the payload, whether it is deflated


class ShardReader:
    """The records of sealed shards and of one that is still open; every byte is checked here, none is copied before it is asked for.

    Raises `ArtifactCorrupt` naming the shard that is missing or damaged.
    """

    def __init__(self, folder: Path, seals: Sequence[Seal]) -> None:
        self._maps: list[memoryview] = []
        self._places: dict[bytes, _Place] = {}
        for seal in seals:
            file = folder / seal.name
            if not file.is_file():
                raise ArtifactCorrupt(f"the shard {file} is missing", hint="run the same command again: only its rows are made anew")
            data = _mapped(file)
            if (found := hashlib.sha256(data).hexdigest()) != seal.sha256:
                raise ArtifactCorrupt(
                    f"the shard {file} is not as it was written ({len(data)} bytes, SHA-256 {found[:12]}…, expected {seal.sha256[:12]}…)",
                    hint=_REDO,
                )
            self._index(data, _records(data))
        for file in open_shards(folder, seals):
            data = _mapped(file)
            self._index(data, _whole_records(data, file))

    def _index(self, data: memoryview, records: Iterator[_Record]) -> None:
        self._maps.append(data)
        shard = len(self._maps) - 1
        self._places.update((key, _Place(shard, start, size, deflated)) for key, start, size, deflated in records)

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> Iterable[bytes]:
        """All keys."""
        return self._places.keys()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> bytes | memoryview | None:
        """The payload of a key; one that is not deflated is a view into the map."""
        place = self._places.get(key)
        if place is None:
            return None
        data = self._maps[place.shard][place.start : place.start + place.size]
        return zlib.decompress(data) if place.deflated else data


class ShardWriter:
    """Appends to the open shard of a folder, the one that an interrupted run left or a new one; raises `SaveFailed`."""

    def __init__(self, folder: Path, seals: Sequence[Seal]) -> None:
        self.folder = folder
        left = open_shards(folder, seals)
        number = 1 + max((int(Path(seal.name).stem) for seal in seals), default=-1)
        self.file = left[0] if left else folder / f"{number:05d}.rows"
        self.rows = self.size = 0
        if left:
            data = _mapped(self.file)
            for _, start, size, _ in _whole_records(data, self.file):
                self.rows, self.size = self.rows + 1, start + size
        try:
            self._handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600)
            self._closed = False
            os.ftruncate(self._handle, self.size)  # what an interruption tore
        except OSError as error:
            raise save_failed(self.file, error, hint=GO_ON) from error

    @property
    def full(self) -> bool:
        """Whether it is time to seal."""
        return self.rows >= ROWS or self.size >= BYTES

    def put(self, key: bytes, payload: bytes, *, deflate: bool) -> None:
        """Append one record; after an error the shard is as it was."""
        packed = zlib.compress(payload) if deflate else payload
        record = _HEADER.pack(_MAGIC, key, len(packed), zlib.crc32(packed, zlib.crc32(key)), deflate) + packed
        try:
            done = 0
            while done < len(record):
                done += os.pwrite(self._handle, record[done:], self.size + done)
        except OSError as error:
            os.ftruncate(self._handle, self.size)
            raise save_failed(self.file, error, hint=GO_ON) from error
        self.rows, self.size = self.rows + 1, self.size + len(record)

    def seal(self) -> Seal:
        """Bring the shard to the disk; the writer is done with it."""
        try:
            os.fsync(self._handle)  # some disks say only now that they are full
        except OSError as error:
            raise save_failed(self.file, error, hint=GO_ON) from error
        return Seal(name=self.file.name, rows=self.rows, sha256=hashlib.sha256(_mapped(self.file)).hexdigest())

    def close(self) -> None:
        """Let go of the file; one without records does not stay."""
        if self._closed:
            return
        self._closed = True
        os.close(self._handle)
        if not self.rows:
            self.file.unlink(missing_ok=True)


def open_shards(folder: Path, seals: Sequence[Seal]) -> list[Path]:
    """The shards that no seal covers: one where a run was interrupted or is going on, else none."""
    sealed = {seal.name for seal in seals}
    return sorted(file for file in folder.glob("*.rows") if file.name not in sealed)


def _mapped(file: Path) -> memoryview:
    with file.open("rb") as handle:
        empty = not os.fstat(handle.fileno()).st_size  # which cannot be mapped
        return memoryview(b"" if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


def _records(data: memoryview) -> Iterator[_Record]:
    """Every record of a sealed shard."""
    at = 0
    while at < len(data):
        _, key, size, _, deflated = _HEADER.unpack_from(data, at)
        yield key, at + _HEADER.size, size, deflated
        at += _HEADER.size + size


def _whole_records(data: memoryview, file: Path) -> Iterator[_Record]:
    """Every record of a shard that may have been torn at its end, where it stops; damage before the end is an error."""
    at = 0
    while len(data) - at >= _HEADER.size:
        magic, key, size, crc, deflated = _HEADER.unpack_from(data, at)
        start, end = at + _HEADER.size, at + _HEADER.size + size
        if magic == _MAGIC and end <= len(data) and zlib.crc32(data[start:end], zlib.crc32(key)) == crc:
            yield key, start, size, deflated
        elif magic == _MAGIC and end >= len(data):
            return
        elif not any(data[at:]):  # a file that had grown when the power failed
            return
        else:
            raise ArtifactCorrupt(f"the shard {file} is damaged after {at} bytes", hint=_REDO)
        at = end
