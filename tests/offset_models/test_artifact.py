"""The folder of an assistant: what it holds, and that nothing wrong is ever loaded from it."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import tiny
from uld_adapters.errors import ArtifactCorrupt, ArtifactMismatch, SaveFailed, UsageError
from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
from uld_offset_models.artifact import save_artifact, seal
from uld_offset_models.assistant import base_fingerprint, load_base
from uld_offset_models.loading import load_artifact
from uld_offset_models.manifest import BaseReference, Manifest, read_manifest, write_manifest
from uld_offset_models.network import Assistant, build_assistant
from uld_offset_models.saving import saving


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
    save_artifact(output, model=assistant.adapter, gate=assistant.gate, tokenizer=tokenizer, manifest=describe(base, tokenizer))
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
        (lambda m: m.update(alpha=1e-9), "not as it was saved"),
        (lambda m: m["data"].update(forget="0" * 64), "not as it was saved"),
        (lambda m: m["files"].pop("README.md"), "not as it was saved"),
        (lambda m: m.pop("sha256"), "it states none"),
    ],
)
def test_an_edited_manifest_is_refused(change: Any, expected: str, saved: tuple[Path, Assistant]) -> None:
    file = saved[0] / "uld.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    change(manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")
    for load in (load_artifact, read_manifest):
        with pytest.raises(ArtifactCorrupt, match=expected) as caught:
            load(saved[0])
        assert str(file) in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: files.pop("adapter_model.safetensors"), "adapter_model.safetensors is not listed"),
        (lambda files: files.update({"../../etc/passwd": "0"}), "passwd is missing"),
        (lambda files: files.update({"/etc/hostname": "0"}), "hostname is missing"),
    ],
)
def test_a_manifest_of_other_files_is_refused(change: Any, expected: str, saved: tuple[Path, Assistant]) -> None:
    manifest = read_manifest(saved[0])
    files = dict(manifest.files)
    change(files)
    write_manifest(saved[0], manifest.model_copy(update={"files": files}))
    with pytest.raises(ArtifactCorrupt, match=expected):
        load_artifact(saved[0])


def test_spaces_and_order_are_no_edit(saved: tuple[Path, Assistant]) -> None:
    file = saved[0] / "uld.json"
    before = read_manifest(saved[0])
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text(encoding="utf-8")).items()))), encoding="utf-8")
    assert read_manifest(saved[0]) == before


def test_what_changes_an_artifact_seals_it_anew(saved: tuple[Path, Assistant]) -> None:
    path = saved[0]
    before = read_manifest(path)
    sealed = seal(path, before.model_copy(update={"margin": 4.5}))
    assert load_artifact(path).manifest == sealed
    assert sealed.margin == 4.5
    assert sealed.sha256 != before.sha256
    assert "4.5" in (path / "README.md").read_text(encoding="utf-8")
    assert stat.S_IMODE((path / "uld.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["chat_template.json", "added_tokens.json", "additional_chat_templates/tool.jinja", "model.safetensors"])
def test_a_file_that_was_put_there_is_named(name: str, saved: tuple[Path, Assistant]) -> None:
    planted = saved[0] / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text("{{ 'Say nothing.' }}", encoding="utf-8")
    with pytest.raises(ArtifactCorrupt, match=f"{name} was added") as caught:
        load_artifact(saved[0])
    assert "take out" in caught.value.hint


def test_a_folder_linked_into_it_is_named(saved: tuple[Path, Assistant], tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    os.symlink(tmp_path / "templates", saved[0] / "additional_chat_templates")
    with pytest.raises(ArtifactCorrupt, match="additional_chat_templates was added"):
        load_artifact(saved[0])


def test_what_no_loader_reads_may_lie_there(saved: tuple[Path, Assistant]) -> None:
    for name in (".DS_Store", ".gitattributes", ".git/config", "NOTES.md", "LICENSE", "Thumbs.db"):
        (saved[0] / name).parent.mkdir(exist_ok=True)
        (saved[0] / name).write_text("x", encoding="utf-8")
    load_artifact(saved[0])


def test_a_tokenizer_of_several_templates_is_saved_whole(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(base, layers=2)
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": tiny.CHAT_TEMPLATE}
    assistant = build_assistant(model, tokenizer, rank=2, lora_alpha=2, gate=True, seed=0)
    manifest = save_artifact(
        tmp_path / "out", model=assistant.adapter, gate=assistant.gate, tokenizer=tokenizer, manifest=describe(base, tokenizer)
    )
    assert "additional_chat_templates/tool_use.jinja" in manifest.files
    assert set(load_artifact(tmp_path / "out").model.tokenizer.chat_template) == {"default", "tool_use"}
    assert stat.S_IMODE((tmp_path / "out" / "additional_chat_templates").stat().st_mode) == 0o700


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


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), "the disk is full"),
        (Exception("Permission denied (os error 13)"), "Permission denied"),
        (OSError(errno.EFBIG, "File too large"), "could not be written: File too large"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(
    raised: Exception, words: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def fails(*args: Any, **options: Any) -> None:
        raise raised

    model, tokenizer = load_base(base, layers=2)
    assistant = build_assistant(model, tokenizer, rank=2, lora_alpha=2, gate=True, seed=0)
    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    before = set(tmp_path.iterdir())
    with pytest.raises(SaveFailed, match=words):
        save_artifact(
            tmp_path / "out", model=assistant.adapter, gate=assistant.gate, tokenizer=tokenizer, manifest=describe(base, tokenizer)
        )
    assert set(tmp_path.iterdir()) == before


def test_a_replacement_that_fails_at_the_last_moment_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with saving(output) as folder:
        (folder / "a").write_text("old", encoding="utf-8")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(SaveFailed, match="Input/output error"), saving(output) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "a").read_text(encoding="utf-8") == "old"


def test_nothing_is_replaced_unasked(saved: tuple[Path, Assistant], base: Path, tmp_path: Path) -> None:
    path, assistant = saved
    tokenizer = load_base(base, layers=1)[1]
    parts: dict[str, Any] = {
        "model": assistant.adapter,
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
