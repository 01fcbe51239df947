"""What training against a target of other tokens needs of each row, kept on disk for the next training: trees, terms and the sums of o."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from safetensors.torch import load, save
from torch import Tensor

from uld_adapters.errors import SaveFailed
from uld_offset_models.bridged_rows import BridgedRow
from uld_offset_models.encoding import Encoded
from uld_offset_models.shards import ShardReader
from uld_offset_models.store import StoreManifest, row_key
from uld_offset_models.store_writer import StoreWriter
from uld_offset_models.term_sums import Sums
from uld_offset_models.track import Track
from uld_offset_models.tree import Grown, Growth

_TENSORS = ("nodes", "target", "known", "standing", "weights", "frozen")
_SUMS = fields(Sums)


class BridgedManifest(StoreManifest):
    """`cache.json` of bridged rows; `of_sha256` is over the way rows are made, the target's cache, both vocabularies, the frozen model
    and the tail policy.
    """

    identity: ClassVar[dict[str, str]] = {"of_sha256": "target or small model"}

    of_sha256: str


def kept_rows(
    folder: Path, rows: Sequence[Encoded], compute: Callable[[Encoded], BridgedRow], *, of_sha256: str
) -> Mapping[Encoded, BridgedRow]:
    """All rows: those that the folder has, and those that `compute` makes, which are then kept there one by one.

    Several processes take turns. A folder that cannot be written costs a warning and the computing, no more. Raises `ArtifactCorrupt`
    naming a damaged shard.
    """
    found: dict[Encoded, BridgedRow] = {}
    try:
        with StoreWriter(folder, BridgedManifest(of_sha256=of_sha256), rows, extend=True, patience=-1) as writer:
            for row in writer.missing:
                found[row] = compute(row)
                writer.put(row, packed(found[row]))
            shards = (writer.finish() if writer.missing else writer.manifest).shards
        reader = ShardReader(folder, shards)
    except SaveFailed as error:
        warnings.warn(f"the bridged rows are not kept for another training: {error.message}", UserWarning, stacklevel=2)
        return {row: found.get(row) or compute(row) for row in rows}
    return {row: unpacked(bytes(reader.get(row_key(row.prompt, row.answer)) or b"")) for row in rows}


def packed(row: BridgedRow) -> bytes:
    """A row as safetensors; `unpacked` takes it back, bit for bit."""
    growth = row.tree.growth
    tensors = {name: getattr(row, name) for name in _TENSORS} | {
        f"sums.{part.name}": _tensor(getattr(row.sums, part.name)) for part in _SUMS
    }
    tensors |= {
        "chain": _ids(growth.chain),
        "path_at": _ids(at for at, _ in growth.paths),
        "path_sizes": _ids(len(path) for _, path in growth.paths),
        "path_tokens": _ids(token for _, path in growth.paths for token in path),
        "completed": _tensor(int(row.completed)),
    }
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpacked(data: bytes) -> BridgedRow:
    """A row out of what `packed` made."""
    found = load(data)
    ends = accumulate(found["path_sizes"].tolist(), initial=0)
    tokens = found["path_tokens"].tolist()
    paths = [tuple(tokens[start:end]) for start, end in pairwise(ends)]
    growth = Growth(Track(), found["chain"].tolist(), list(zip(found["path_at"].tolist(), paths, strict=True)))
    sums: dict[str, Any] = {part.name: found[f"sums.{part.name}"] for part in _SUMS}
    sums |= {part.name: int(sums[part.name]) for part in _SUMS if part.type is int}
    return BridgedRow(tree=Grown(growth), sums=Sums(**sums), completed=bool(found["completed"]), **{name: found[name] for name in _TENSORS})


def _ids(values: Iterable[int]) -> Int[Tensor, " ids"]:
    return torch.tensor(list(values), dtype=torch.long)


def _tensor(value: Tensor | int) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)
