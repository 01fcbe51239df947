"""A folder of rows in the making; what was put in stays, whatever ends the process."""

from collections.abc import Collection
from pathlib import Path
from typing import Generic, Self

from filelock import FileLock, Timeout

from uld_adapters.errors import UsageError
from uld_offset_models.encoding import Encoded
from uld_offset_models.saving import save_failed
from uld_offset_models.shards import GO_ON, ShardReader, ShardWriter
from uld_offset_models.store import STORE, Kind, check_identity, read_store_manifest, row_key, write_store_manifest


class StoreWriter(Generic[Kind]):
    """Opens a folder for the rows wanted: a new one, one that an interruption left, or with `extend` one made for other data.

    `missing` are the rows to come, `stored` those that are there. Folder mode 0700, files 0600. Raises `UsageError` for a folder that
    another process writes to or whose identity is another, `ArtifactCorrupt` naming a damaged shard, and `SaveFailed`.
    """

    def __init__(self, path: Path, wanted: Kind, rows: Collection[Encoded], *, extend: bool = False, patience: float = 0) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(path / ".lock", timeout=patience, mode=0o600)
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(f"another process is writing to {path}", hint="wait for it, or choose another -o/--output") from error
        except OSError as error:
            raise save_failed(path, error, hint=GO_ON) from error
        try:
            self._open(wanted, rows, extend)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, wanted: Kind, rows: Collection[Encoded], extend: bool) -> None:
        found = self._found(wanted, extend)
        shards = tuple(seal for seal in found.shards if (self.path / seal.name).is_file())  # one that is gone is made anew
        self._there = ShardReader(self.path, shards)
        keys = {row_key(row.prompt, row.answer): row for row in rows}
        self.missing = [row for key, row in keys.items() if key not in self._there]
        self.stored = [row for key, row in keys.items() if key in self._there]
        state = {
            "data": wanted.data,
            "shards": shards,
            "finished": found.finished and not self.missing,
            "rows": len({*keys, *self._there.keys()}),
        }
        self.manifest = found.model_copy(update=state)
        if self.manifest != found or not (self.path / STORE).exists():
            self.manifest = write_store_manifest(self.path, self.manifest)
        self._shard = ShardWriter(self.path, shards)

    def _found(self, wanted: Kind, extend: bool) -> Kind:
        if not (self.path / STORE).exists():
            if any(self.path.glob("[!.]*")):
                raise UsageError(f"{self.path} exists and is no cache", hint="choose another -o/--output")
            return wanted
        found = read_store_manifest(self.path, type(wanted))
        hint = "choose another -o/--output, or delete the folder"
        check_identity(self.path, found, wanted.model_dump(exclude={"data"}), hint=hint)
        if not extend:
            said = wanted.model_dump(include={"data"})
            check_identity(self.path, found, said, hint=f"{hint}; --extend keeps its rows and adds those that it lacks")
        return found

    def get(self, row: Encoded) -> bytes | memoryview:
        """The payload of a row that was there when the folder was opened."""
        found = self._there.get(row_key(row.prompt, row.answer))
        if found is None:
            raise KeyError(row)
        return found

    def put(self, row: Encoded, payload: bytes, *, deflate: bool = True) -> None:
        """Keep a row; when this returns it has been written."""
        self._shard.put(row_key(row.prompt, row.answer), payload, deflate=deflate)
        if self._shard.full:
            self._seal(finished=False)
            self._shard = ShardWriter(self.path, self.manifest.shards)

    def finish(self) -> Kind:
        """Seal the last shard and say that the folder is whole."""
        self._seal(finished=True)
        return self.manifest

    def _seal(self, *, finished: bool) -> None:
        shards = (*self.manifest.shards, self._shard.seal()) if self._shard.rows else self.manifest.shards
        self.manifest = write_store_manifest(self.path, self.manifest.model_copy(update={"shards": shards, "finished": finished}))
        self._shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shard.close()
        self._lock.release()
