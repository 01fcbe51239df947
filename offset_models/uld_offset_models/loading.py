"""Artifacts become models: one alone, or several of one base on one backbone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from uld_adapters.errors import ArtifactMismatch, UsageError
from uld_adapters.vocabulary.tokens import load_tokenizer, tokenizer_fingerprint
from uld_offset_models.adapter_batch import Parts, split_batch
from uld_offset_models.artifact import GATE, Artifact, verify_files
from uld_offset_models.assistant import Gate, SmallModel, base_fingerprint, load_base, real_rows, tolerating_peft
from uld_offset_models.manifest import Manifest, read_manifest
from uld_offset_models.pair import Pair, load_pair
from uld_offset_models.thin import thinned


def load_artifact(path: str | Path, *, base: str | None = None, device: str = "cpu", dtype: torch.dtype | None = None) -> Artifact:
    """Check every hash, load the base, put on it what was trained (float32 by default) and return the assistant or pair in eval mode.

    Raises `ArtifactCorrupt` when files differ and `ArtifactMismatch` when base or tokenizer are not those of the training.
    """
    return load_together([path], base=base, device=device, dtype=dtype)[0]


def load_together(
    paths: Sequence[str | Path], *, base: str | None = None, device: str = "cpu", dtype: torch.dtype | None = None
) -> list[Artifact]:
    """Load artifacts of one base and as many layers; several need to be LoRA adapters (`Manifest.lora`).

    The adapter of an assistant alone is merged. Several have one backbone, whose rows go through the adapters of their own; so have
    the two halves of a pair. Raises what `load_artifact` raises.
    """
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
    gates = [_load_gate(folder, manifest, model, device) for folder, manifest in zip(folders, manifests, strict=True)]
    dtype = dtype or torch.float32
    pair = manifests[0].pair
    if not manifests[0].lora and pair is not None:
        made: list[SmallModel | Pair] = [
            load_pair(folders[0], model, tokenizers[0], gates[0], whole=pair.whole, device=device, dtype=dtype)
        ]
    else:
        whole, parts = _with_adapters(model, folders, pairs=any(manifest.pair is not None for manifest in manifests))
        whole = whole.to(device=device, dtype=dtype).eval().requires_grad_(False)
        made, head = [], real_rows(whole, tokenizers[0])
        for at, (manifest, tokenizer, gate) in enumerate(zip(manifests, tokenizers, gates, strict=True)):
            own = SmallModel(whole.base_model, head, gate, tokenizer, parts, adapter=at)
            made.append(own if manifest.pair is None else Pair(own, replace(own, gate=None, adapter=len(folders))))
    return [Artifact(folder, manifest, each) for folder, manifest, each in zip(folders, manifests, made, strict=True)]


def _with_adapters(model: Any, folders: list[Path], *, pairs: bool) -> tuple[Any, Parts | None]:
    """The base with the folders' adapters by their places, and with `pairs` none at the last place; the only one is merged."""
    from peft import PeftModel

    names: list[str | None] = [str(at) for at in range(len(folders))]
    with tolerating_peft():
        adapter = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            adapter.load_adapter(str(folder), adapter_name=name)
        if len(folders) == 1 and not pairs:
            return thinned(adapter.merge_and_unload()), None
    return split_batch(adapter, [*names, None] if pairs else names)


def _check_base(folders: list[Path], manifests: list[Manifest], name: str) -> None:
    """Compare the base's weights with what each manifest says of them."""
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
    for owner, tokenizer in found.items():
        if (print_ := tokenizer_fingerprint(tokenizer)) != manifest.tokenizer_sha256:
            raise ArtifactMismatch(
                f"{folder} was trained with tokenizer {manifest.tokenizer_sha256[:12]}…, but the tokenizer of {owner} is {print_[:12]}…",
                hint="give the base model that the assistant was trained on",
            )


def _load_gate(folder: Path, manifest: Manifest, model: Any, device: str) -> Gate | None:
    from safetensors.torch import load_file

    if not manifest.gate:
        return None
    gate = Gate(model.config.hidden_size)
    gate.load_state_dict(load_file(str(folder / GATE)))
    return gate.to(device).eval().requires_grad_(False)
