"""A folder of rows: `cache.json` says what they are of, shards hold them, and each is found by its token ids."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from uld_adapters.errors import ArtifactCorrupt, UsageError
from uld_offset_models.manifest import Frozen, digest_of, write_sealed
from uld_offset_models.saving import save_failed
from uld_offset_models.shards import GO_ON, KEY, Seal

STORE = "cache.json"
_ANEW = "delete the folder and make the cache again, or restore it from its backup"


class StoreManifest(Frozen):
    """`cache.json`. `rows` is how many different rows there are to be, `data` maps a set to a hash of its rows.

    `identity` names the fields by which two stores are compared, and what they are called in errors.
    """

    identity: ClassVar[dict[str, str]] = {}

    format: Literal[1] = 1
    data: dict[str, str] = Field(default_factory=dict)
    rows: int = Field(default=0, ge=0)
    finished: bool = False
    shards: tuple[Seal, ...] = ()
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    sha256: str = ""


Kind = TypeVar("Kind", bound=StoreManifest)


def row_key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    """What a row is found by: a digest over its ids, and where the answer begins."""
    ids = np.array([len(prompt_ids), *prompt_ids, *answer_ids], dtype="<u4")
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY).digest()


def read_store_manifest(path: Path, kind: type[Kind]) -> Kind:
    """Read and check `cache.json`; raises `UsageError` for what is no cache, `ArtifactCorrupt` for a damaged one."""
    file = path / STORE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.get("format", 1) != 1:
            raise ArtifactCorrupt(
                f"{file} has format {value['format']!r}; this version reads format 1", hint="pip install --upgrade uld-sdk"
            )
        manifest = kind.model_validate(value)
    except OSError as error:
        raise UsageError(f"{path} is no cache: {STORE} cannot be read", hint="give the folder that `uld-sdk cache -o` wrote") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactCorrupt(f"{file} is no valid manifest: {where}: {first['msg']}", hint=_ANEW) from error
    except ValueError as error:
        raise ArtifactCorrupt(f"{file} is not whole JSON: {error}", hint=_ANEW) from error
    if (found := digest_of(value)) != manifest.sha256:
        raise ArtifactCorrupt(
            f"{file} is not as it was written: its content has SHA-256 {found[:12]}…, it states {manifest.sha256[:12]}…", hint=_ANEW
        )
    return manifest


def write_store_manifest(path: Path, manifest: Kind) -> Kind:
    """Write `cache.json` into the folder, whole or not at all; raises `SaveFailed`."""
    try:
        return type(manifest).model_validate(write_sealed(path / STORE, manifest.model_dump(mode="json")))
    except OSError as error:
        raise save_failed(path / STORE, error, hint=GO_ON) from error


def check_identity(path: Path, found: StoreManifest, wanted: dict[str, Any], *, hint: str) -> None:
    """Raise `UsageError` for the first field of the identity that is wanted and that the store has otherwise."""
    for field, what in found.identity.items():
        there = getattr(found, field)
        if field not in wanted or (here := wanted[field]) == there:
            continue
        if isinstance(here, dict):
            names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
            raise UsageError(f"{path} was made for other data: {', '.join(names)} differ", hint=hint)
        raise UsageError(f"{path} was made for another {what}: {_short(there)}, not {_short(here)}", hint=hint)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
