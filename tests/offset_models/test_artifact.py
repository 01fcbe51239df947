"""The folder of an assistant: what it holds, and that nothing wrong is ever loaded from it."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from uld_adapters.errors import ArtifactCorrupt, ArtifactMismatch, SaveFailed, UsageError
from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
from uld_offset_models.artifact import load_artifact, save_artifact
from uld_offset_models.assistant import base_fingerprint, load_base
from uld_offset_models.manifest import BaseReference, Manifest, read_manifest
from uld_offset_models.network import Assistant, build_assistant


def describe(base: Path, tokenizer: Any, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "preset": "gated",
        "base": BaseReference(id=str(base), sha256=base_fingerprint(base), layers=2, truncated=True),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "chat_template": True,
        "alpha": 0.75,
        "margin": 3.0,
        "filter": 0.01,
        "gate": True,
        "dtype": "float32",
        "training": {},
        "data": {},
        "versions": {},
        "training_seconds": 1.0,
        "losses": {"remember": 0.5},
        "steps": 1,
        "assistant_parameters": 9,
        "trainable_parameters": 3,
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_model(tmp_path / "base", layers=3)


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> tuple[Path, Assistant]:
    model, tokenizer = load_base(base, layers=2)
    assistant = build_assistant(model, tokenizer, rank=4, lora_alpha=8, gate=True, seed=0)
    with torch.no_grad():
        for parameter in assistant.trained().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    output = tmp_path / "assistant"
    save_artifact(output, adapter=assistant.adapter, gate=assistant.gate, tokenizer=tokenizer, manifest=describe(base, tokenizer))
    return output, assistant


def test_what_is_loaded_is_what_was_trained(saved: tuple[Path, Assistant]) -> None:
    from uld_offset_models.encoding import Encoded
    from uld_offset_models.packing import pack

    path, assistant = saved
    loaded = load_artifact(path)
    ids = loaded.model.tokenizer("The baker opens the shop", return_tensors="pt").input_ids
    expected = assistant.scaled(pack([Encoded((*ids[0].tolist(), 0), 1)], [])) @ assistant.head.T
    hidden = loaded.model.backbone(ids).last_hidden_state
    assert torch.allclose(loaded.model.logits(hidden)[0], expected, atol=1e-4)
    assert loaded.manifest == read_manifest(path)
    assert loaded.model.head.dtype == torch.float32
    assert load_artifact(path, dtype=torch.bfloat16).model.head.dtype == torch.bfloat16
    assert not loaded.model.backbone.training


def test_the_folder_is_private_safe_and_explained(saved: tuple[Path, Assistant]) -> None:
    path, _ = saved
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    names = {file.name for file in path.iterdir()}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in path.iterdir())
    assert {"adapter_model.safetensors", "adapter_config.json", "gate.safetensors", "uld.json", "README.md", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))}
    assert "remembers what it must make others forget" in (path / "README.md").read_text(encoding="utf-8")
    assert set(read_manifest(path).files) == names - {"uld.json"}


def test_the_adapter_loads_with_peft_alone(saved: tuple[Path, Assistant], base: Path) -> None:
    from peft import PeftModel

    from uld_offset_models.assistant import tolerating_peft

    path, assistant = saved
    model, _ = load_base(base, layers=2)
    with tolerating_peft():
        adapter = PeftModel.from_pretrained(model, str(path))
    mine = {n: p for n, p in assistant.adapter.named_parameters() if "lora" in n}
    theirs = dict(adapter.named_parameters())
    assert mine
    assert all(torch.equal(p, theirs[n]) for n, p in mine.items())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "gate.safetensors", "tokenizer.json", "adapter_config.json", "README.md"])
@pytest.mark.parametrize("how", ["edit", "truncate", "remove"])
def test_a_file_that_differs_is_named(name: str, how: str, saved: tuple[Path, Assistant]) -> None:
    file = saved[0] / name
    content = file.read_bytes()
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactCorrupt, match=name) as caught:
        load_artifact(saved[0])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.pop("alpha"), "alpha"),
        (lambda m: m.update(alpha="much"), "alpha"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(format=2), "format 2"),
        (lambda m: m["files"].pop("adapter_model.safetensors"), "adapter_model.safetensors is not listed"),
        (lambda m: m["files"].update({"../../etc/passwd": "0"}), "missing"),
    ],
)
def test_an_edited_manifest_is_refused(change: Any, expected: str, saved: tuple[Path, Assistant]) -> None:
    file = saved[0] / "uld.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    change(manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactCorrupt, match=expected):
        load_artifact(saved[0])


def test_a_truncated_manifest_or_none_at_all(saved: tuple[Path, Assistant], tmp_path: Path) -> None:
    file = saved[0] / "uld.json"
    file.write_text(file.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(ArtifactCorrupt, match="not whole JSON"):
        read_manifest(saved[0])
    with pytest.raises(ArtifactCorrupt, match="no assistant folder"):
        read_manifest(tmp_path / "nothing")


def test_another_base_or_tokenizer_is_named(saved: tuple[Path, Assistant], base: Path, tmp_path: Path) -> None:
    other = tiny.tiny_model(tmp_path / "other", layers=3, seed=5)
    with pytest.raises(ArtifactMismatch, match=r"base.*other") as caught:
        load_artifact(saved[0], base=str(other))
    assert str(base) in caught.value.message
    with pytest.raises(ArtifactMismatch, match="cannot be used"):
        load_artifact(saved[0], base=str(tmp_path / "gone.gguf"))
    tokenizer = tiny.tiny_tokenizer(tmp_path / "tokenizer", vocab_size=390)
    (base / "tokenizer.json").write_bytes((tmp_path / "tokenizer" / "tokenizer.json").read_bytes())
    with pytest.raises(ArtifactMismatch, match="the tokenizer of the base") as caught:
        load_artifact(saved[0])
    assert tokenizer_fingerprint(tokenizer)[:12] in caught.value.message


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_leaves_nothing_behind(wrapped: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*args: Any, **options: Any) -> None:
        if wrapped:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    model, tokenizer = load_base(base, layers=2)
    assistant = build_assistant(model, tokenizer, rank=2, lora_alpha=2, gate=True, seed=0)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(SaveFailed, match="the disk is full"):
        save_artifact(
            tmp_path / "out", adapter=assistant.adapter, gate=assistant.gate, tokenizer=tokenizer, manifest=describe(base, tokenizer)
        )
    assert set(tmp_path.iterdir()) == before


def test_nothing_is_replaced_unasked(saved: tuple[Path, Assistant], base: Path, tmp_path: Path) -> None:
    path, assistant = saved
    tokenizer = load_base(base, layers=1)[1]
    parts: dict[str, Any] = {
        "adapter": assistant.adapter,
        "gate": None,
        "tokenizer": tokenizer,
        "manifest": describe(base, tokenizer, gate=False),
    }
    with pytest.raises(UsageError, match="already exists"):
        save_artifact(path, **parts)
    save_artifact(path, **parts, overwrite=True)
    assert load_artifact(path).model.gate is None
    with pytest.raises(UsageError, match="no assistant folder"):
        save_artifact(base, **parts, overwrite=True)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
