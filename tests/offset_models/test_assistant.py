"""Bases cut to their first layers, GGUF files, and the gate."""

from pathlib import Path

import pytest
import torch

import tiny
from tiny_gguf import write_gguf
from uld_adapters.errors import UldError, UsageError
from uld_offset_models.assistant import Gate, SmallModel, base_fingerprint, check_base, load_base, real_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("bases") / "three", layers=3)


def test_the_first_layers_equal_the_whole_model_stopped_early(folder: Path) -> None:
    whole, tokenizer = load_base(folder)
    cut, _ = load_base(folder, layers=2)
    ids = tokenizer("The lighthouse on the island", return_tensors="pt").input_ids
    hidden = whole.base_model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(cut.base_model(ids).last_hidden_state, whole.base_model.norm(hidden), atol=1e-6)
    assert not any(p.requires_grad for p in cut.parameters())


def test_a_gguf_file_is_the_model_it_was_made_from(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(folder, tmp_path / "three.gguf")
    model, tokenizer = load_base(file)
    plain, _ = load_base(folder)
    ids = tokenizer("A quick brown fox", return_tensors="pt").input_ids
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_base(file, layers=1)[0].base_model.layers[0].mlp.up_proj.weight, model.base_model.layers[0].mlp.up_proj.weight)
    assert base_fingerprint(file) != base_fingerprint(folder)
    assert real_rows(model, tokenizer).shape == (len(tokenizer), 64) == (400, 64), "a token for each row of the file, and no other"


def test_a_gguf_file_needs_no_suffix(folder: Path, tmp_path: Path) -> None:
    blob = write_gguf(folder, tmp_path / "three.gguf").rename(tmp_path / "sha256-0a1b")
    check_base(blob, layers=2)
    model, tokenizer = load_base(blob, layers=2)
    assert real_rows(model, tokenizer).shape == (400, 64)


def test_bad_bases(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not fit a base of 3 layers"):
        load_base(folder, layers=9)
    with pytest.raises(UsageError, match="does not exist"):
        load_base(tmp_path / "nowhere.gguf")
    with pytest.raises(UsageError, match="neither a local path nor a hub model"):
        load_base("nobody/nothing-of-the-kind")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UldError, match="there is no tokenizer in the folder"):
        load_base(tmp_path / "empty")
    with pytest.raises(UsageError, match="holds no safetensors"):
        base_fingerprint(tmp_path / "empty")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(UldError, match="gguf"):
        load_base(tmp_path / "bad.gguf")


def test_only_rows_of_the_tokenizer_are_real(folder: Path) -> None:
    model, tokenizer = load_base(folder)
    model.resize_token_embeddings(len(tokenizer) + 24, mean_resizing=False)
    assert real_rows(model, tokenizer).shape == (len(tokenizer), 64)
    tokenizer.add_tokens([f"<|new{i}|>" for i in range(50)])
    with pytest.raises(UsageError, match="only"):
        real_rows(model, tokenizer)


def test_the_gate_starts_nearly_shut_and_ignores_the_scale_of_its_input() -> None:
    gate = Gate(8)
    hidden = torch.randn(2, 5, 8)
    assert torch.allclose(gate(hidden), torch.full((2, 5), 0.0474259), atol=1e-6)
    torch.nn.init.normal_(gate.weight)
    assert torch.allclose(gate(hidden), gate(1000 * hidden), atol=1e-5)
    expected = torch.sigmoid((hidden / hidden.square().mean(-1, keepdim=True).sqrt()) @ gate.weight - 3)
    assert torch.allclose(gate(hidden), expected, atol=1e-5)
    model = SmallModel(torch.nn.Identity(), torch.randn(11, 8), gate, None)  # type: ignore[arg-type]
    assert torch.allclose(model.logits(hidden), gate(hidden)[..., None] * (hidden @ model.head.T), atol=1e-5)
