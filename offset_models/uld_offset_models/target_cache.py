"""What the target says of the training texts, asked once and kept: training reads this folder in the server's place."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from uld_adapters.errors import UsageError
from uld_offset_models.encoding import Encoded
from uld_offset_models.shards import ShardReader
from uld_offset_models.store import StoreManifest, read_store_manifest, row_key
from uld_offset_models.target_record import TargetLogprobs, unpack

_SHOWN = 3  # rows named in an error


class CacheManifest(StoreManifest):
    """`cache.json` of a target's log-probabilities; `scoring` says how the server was asked.

    `tokenizer_sha256` and `template_sha256` are of what turned texts into ids; `top_logprobs` is None for complete distributions.
    """

    identity: ClassVar[dict[str, str]] = {
        "target": "target",
        "tokenizer_sha256": "tokenizer",
        "template_sha256": "chat template",
        "top_logprobs": "number of log-probabilities",
        "data": "data",
    }

    target: str
    backend: str
    scoring: str
    top_logprobs: int | None
    tokenizer_sha256: str
    template_sha256: str


def template_hash(tokenizer: Any, *, chat_template: bool) -> str:
    """SHA-256 over how prompts are rendered: by the chat template, or the messages' contents, a line each."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template if chat_template else None).encode()).hexdigest()


class TargetCache:
    """A finished cache, read through memory maps; see `open`."""

    def __init__(self, path: Path, manifest: CacheManifest, rows: ShardReader) -> None:
        self.path, self.manifest, self._rows = path, manifest, rows

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the folder that `uld-sdk cache -o` wrote, and check every byte of it.

        Raises `UsageError` for one that is not finished, and `ArtifactCorrupt` naming the shard that is damaged.
        """
        path = Path(path).expanduser()
        manifest = read_store_manifest(path, CacheManifest)
        rows = ShardReader(path, manifest.shards)
        if not manifest.finished:
            raise UsageError(
                f"{path} is not finished: it holds {len(rows)} of {manifest.rows} rows",
                hint="run the same `uld-sdk cache` again: it goes on from there",
            )
        return cls(path, manifest, rows)

    @property
    def target(self) -> str:
        """The model's name, as its server gave it."""
        return self.manifest.target

    @property
    def top_logprobs(self) -> int | None:
        """How many log-probabilities a position has, None for all."""
        return self.manifest.top_logprobs

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], *, place: str = "") -> TargetLogprobs:
        """Log p_M at the answer's positions; raises `UsageError` naming the row's place where the cache does not have it."""
        found = self._rows.get(row_key(prompt_ids, answer_ids))
        if found is None:
            self._absent([place or f"a row of {len(prompt_ids)} prompt tokens and {len(answer_ids)} answer tokens"], of=1)
        return unpack(found)

    def check(self, rows: Mapping[Encoded, str]) -> None:
        """Raise `UsageError` naming the places of rows that the cache does not have: it was made for other data."""
        missing = [place for row, place in rows.items() if row_key(row.prompt, row.answer) not in self._rows]
        if missing:
            self._absent(missing, of=len(rows))

    def _absent(self, places: Sequence[str], *, of: int) -> NoReturn:
        shown = ", ".join(places[:_SHOWN]) + (" and others" if len(places) > _SHOWN else "")
        raise UsageError(
            f"{self.path} was made for other data: it lacks {len(places)} of {of} rows, {shown}",
            hint="make it with the same --forget, --retain, --refusals, --seed and --max-length as the training (`uld-sdk cache`)",
        )
