"""Final hidden states of a frozen model that runs here, computed once and kept: its head turns them into whole distributions.

They are kept bit for bit. Half precision would take half the room and move log-probabilities of SmolLM2-135M by up to .02 nats (bfloat16:
.2), which is more than a pair that has not been trained yet may differ by, and deflate gains less than a tenth.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from uld_adapters.errors import SaveFailed
from uld_offset_models.encoding import Encoded
from uld_offset_models.shards import ShardReader
from uld_offset_models.store import StoreManifest, row_key
from uld_offset_models.store_writer import StoreWriter

_ROWS = 64  # computed at a time, then kept


class StatesManifest(StoreManifest):
    """`cache.json` of hidden states: whose, as the SHA-256 of its weights, in which type they were computed, and their width."""

    identity: ClassVar[dict[str, str]] = {"weights_sha256": "model", "dtype": "precision", "width": "width"}

    weights_sha256: str
    dtype: str
    width: int


class States(Mapping[Encoded, Tensor]):
    """Hidden states (tokens, width) at the answer positions of each row, read from memory maps when they are asked for."""

    def __init__(self, reader: ShardReader, rows: Sequence[Encoded], *, dtype: torch.dtype, width: int) -> None:
        self._reader, self._rows, self._dtype, self._width = reader, dict.fromkeys(rows), dtype, width

    def __getitem__(self, row: Encoded) -> Tensor:
        found = self._reader.get(row_key(row.prompt, row.answer)) if row in self._rows else None
        if found is None:
            raise KeyError(row)
        return torch.frombuffer(bytearray(found), dtype=self._dtype).reshape(-1, self._width)

    def __iter__(self) -> Iterator[Encoded]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def kept_states(
    folder: Path,
    rows: Sequence[Encoded],
    compute: Callable[[Sequence[Encoded]], Mapping[Encoded, Tensor]],
    *,
    weights_sha256: str,
    dtype: torch.dtype,
    width: int,
) -> Mapping[Encoded, Tensor]:
    """The states of all rows: those that the folder has, and those that `compute` makes, which are then kept there.

    Several processes take turns. A folder that cannot be written costs a warning and the computing, no more. Raises `UsageError` for the
    states of another model, and `ArtifactCorrupt` naming a damaged shard.
    """
    name = str(dtype).removeprefix("torch.")
    wanted = StatesManifest(weights_sha256=weights_sha256, dtype=name, width=width)
    try:
        with StoreWriter(folder, wanted, rows, extend=True, patience=-1) as writer:
            for at in range(0, len(writer.missing), _ROWS):
                some = writer.missing[at : at + _ROWS]
                for row, states in compute(some).items():
                    writer.put(row, states.to(dtype).contiguous().view(torch.uint8).numpy().tobytes(), deflate=False)
            shards = (writer.finish() if writer.missing else writer.manifest).shards
        return States(ShardReader(folder, shards), rows, dtype=dtype, width=width)
    except SaveFailed as error:
        warnings.warn(f"hidden states are not kept for another training: {error.message}", UserWarning, stacklevel=2)
        return compute(rows)
