"""A trained assistant as a folder: peft adapter, gate, tokenizer, card, and a manifest that pins every file by its SHA-256."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import ArtifactCorrupt, ArtifactMismatch, UsageError
from uld_offset_models.card import model_card
from uld_offset_models.manifest import DIRECT, MANIFEST, RETRAIN, Calibration, Manifest, read_manifest, write_manifest
from uld_offset_models.saving import saving

if TYPE_CHECKING:
    import torch

    from uld_offset_models.assistant import Gate, SmallModel

GATE = "gate.safetensors"
_HARMLESS = ("*.md", "LICENSE*", "Thumbs.db", "desktop.ini")  # no loader reads these, nor hidden files


@dataclass(frozen=True)
class Artifact:
    """A loaded assistant, ready for inference."""

    path: Path
    manifest: Manifest
    model: "SmallModel"


def verify_files(path: Path, manifest: Manifest) -> None:
    """Compare every file with its SHA-256 in the manifest; raises `ArtifactCorrupt` naming each that differs or was added.

    Added files count where a loader might read them: a chat template put there later would change every prompt.
    """
    wrong = []
    for name, expected in manifest.files.items():
        file = path / name
        if ".." in PurePosixPath(name).parts or not file.is_relative_to(path) or not file.is_file():
            wrong.append(f"{name} is missing")
        elif (found := _sha256(file)) != expected:
            wrong.append(f"{name} differs ({file.stat().st_size} bytes, SHA-256 {found[:12]}…, expected {expected[:12]}…)")
    required = {"adapter_config.json", "adapter_model.safetensors"} | ({GATE} if manifest.gate else set())
    wrong += [f"{name} is not listed in {MANIFEST}" for name in sorted(required - manifest.files.keys())]
    hint = RETRAIN if wrong else "take out of the folder what does not belong there"
    wrong += [f"{name} was added" for name in _members(path) if name not in manifest.files and not _harmless(name)]
    if wrong:
        raise ArtifactCorrupt(f"{path} is not as it was saved: {'; '.join(wrong)}", hint=hint)


def load_artifact(path: str | Path, *, base: str | None = None, device: str = "cpu", dtype: "torch.dtype | None" = None) -> Artifact:
    """Check every hash, load the base, merge the adapter (float32 by default) and return the assistant in eval mode.

    Raises `ArtifactCorrupt` when files differ and `ArtifactMismatch` when base or tokenizer are not those of the training.
    """
    return load_together([path], base=base, device=device, dtype=dtype)[0]


def load_together(
    paths: Sequence[str | Path], *, base: str | None = None, device: str = "cpu", dtype: "torch.dtype | None" = None
) -> list[Artifact]:
    """Load artifacts of one base and as many layers onto one backbone, as `load_artifact` does one.

    Only of a single one the adapter is merged; the rows of several go through the adapters of their own (`adapter_batch`).
    """
    import torch
    from peft import PeftModel

    from uld_adapters.vocabulary.tokens import load_tokenizer
    from uld_offset_models.adapter_batch import Parts, split_batch
    from uld_offset_models.assistant import SmallModel, load_base, real_rows, tolerating_peft
    from uld_offset_models.thin import thinned

    folders = [Path(path) for path in paths]
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        verify_files(folder, manifest)
    name = base or manifests[0].base.id
    _check_base(folders, manifests, name)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    model, base_tokenizer = load_base(name, layers=manifests[0].base.layers, dtype=torch.float32)
    for folder, manifest, tokenizer in zip(folders, manifests, tokenizers, strict=True):
        _check_tokenizers(folder, manifest, {f"the folder {folder}": tokenizer, f"the base {name}": base_tokenizer})
    names = [str(place) for place in range(len(folders))]
    with tolerating_peft():
        adapter = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=names[0])
        for folder, other in zip(folders[1:], names[1:], strict=True):
            adapter.load_adapter(str(folder), adapter_name=other)
        parts = Parts() if len(folders) > 1 else None
        whole = thinned(adapter.merge_and_unload()) if parts is None else split_batch(adapter, names, parts)
    whole = whole.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)
    head = real_rows(whole, tokenizers[0])
    found = zip(folders, manifests, tokenizers, strict=True)
    return [
        Artifact(folder, manifest, SmallModel(whole.base_model, head, _load_gate(folder, manifest, whole, device), tokenizer, parts))
        for folder, manifest, tokenizer in found
    ]


def _check_base(folders: "list[Path]", manifests: list[Manifest], name: str) -> None:
    """Compare the base's weights with what each manifest says of them."""
    from uld_offset_models.assistant import base_fingerprint

    try:
        found = base_fingerprint(name)
    except UsageError as error:
        raise ArtifactMismatch(
            f"the base of {folders[0]} was {manifests[0].base.id}, and {name} cannot be used: {error.message}",
            hint="name the base model's place with assistant_base=... (--assistant-base)",
        ) from error
    for folder, manifest in zip(folders, manifests, strict=True):
        if found != manifest.base.sha256:
            trained_on = f"{manifest.base.id} (SHA-256 {manifest.base.sha256[:12]}…)"
            raise ArtifactMismatch(
                f"{folder} was trained on {trained_on}, but {name} has SHA-256 {found[:12]}…",
                hint="give the same base model with assistant_base=... (--assistant-base), or train again on this one",
            )


def _check_tokenizers(folder: Path, manifest: Manifest, found: dict[str, Any]) -> None:
    from uld_adapters.vocabulary.tokens import tokenizer_fingerprint

    for owner, tokenizer in found.items():
        if (print_ := tokenizer_fingerprint(tokenizer)) != manifest.tokenizer_sha256:
            raise ArtifactMismatch(
                f"{folder} was trained with tokenizer {manifest.tokenizer_sha256[:12]}…, but the tokenizer of {owner} is {print_[:12]}…",
                hint="give the base model that the assistant was trained on",
            )


def _load_gate(folder: Path, manifest: Manifest, model: Any, device: str) -> "Gate | None":
    from safetensors.torch import load_file

    from uld_offset_models.assistant import Gate

    if not manifest.gate:
        return None
    gate = Gate(model.config.hidden_size)
    gate.load_state_dict(load_file(str(folder / GATE)))
    return gate.to(device).eval().requires_grad_(False)


def save_artifact(
    output: str | Path, *, adapter: Any, gate: "Gate | None", tokenizer: Any, manifest: Manifest, overwrite: bool = False
) -> Manifest:
    """Write the folder beside its final name and rename it at the end; returns the manifest with the files' hashes.

    `adapter` is a peft model. Raises `SaveFailed` (and leaves nothing under `output`) when the disk is full or not writable.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    with saving(output) as folder:
        from safetensors.torch import save_file

        # Asked to decide by itself whether embeddings belong in the file, peft looks for a config.json on the hub.
        adapter.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        if gate is not None:
            save_file({name: value.detach().float().cpu().contiguous() for name, value in gate.state_dict().items()}, str(folder / GATE))
        tokenizer.save_pretrained(str(folder))
        return seal(folder, manifest)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write card and manifest for the files that lie in the folder; whatever changes an artifact ends with this."""
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    return write_manifest(folder, manifest.model_copy(update={"files": {name: _sha256(folder / name) for name in _members(folder)}}))


def recalibrate(path: str | Path, calibration: Calibration) -> Manifest:
    """Give an artifact the chosen alpha, margin and filter, with the record of the choice; returns its new manifest.

    The folder is made anew beside its name and takes its place whole, for card and manifest must change together. Raises
    `ArtifactCorrupt` where it is not as it was saved, and `SaveFailed`, which leaves it as it was.
    """
    path = Path(path).resolve()
    manifest = read_manifest(path)
    verify_files(path, manifest)
    changed = {**manifest.model_dump(), **calibration.chosen, "calibration": calibration.model_dump()}
    with saving(path) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        return seal(folder, Manifest.model_validate(changed))


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace a folder unless told to, and anything that `uld-sdk train` did not make even then."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise UsageError(f"{output} already exists", hint="choose another -o/--output, or add --overwrite")
    if output.exists() and not any((output / name).is_file() for name in (MANIFEST, DIRECT)):
        raise UsageError(f"{output} exists and is no assistant folder", hint="choose another -o/--output")


def _members(folder: Path) -> list[str]:
    """Every file of the folder but the manifest and hidden ones (.git, .DS_Store); links to folders count, being read through."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return [name for name in names if name != MANIFEST and not any(part.startswith(".") for part in PurePosixPath(name).parts)]


def _harmless(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name, pattern) for pattern in _HARMLESS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
