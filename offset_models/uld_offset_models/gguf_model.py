"""A GGUF file as a plain transformers model in floating point: read once, only the layers asked for, nothing left quantised."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uld_adapters.errors import MissingExtra, UsageError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ROOT = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: where it starts (bytes), its ggml type, and its shape in torch order."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file (version 2 or 3): metadata without the long string arrays, and the table of tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]

    @classmethod
    def read(cls, path: Path) -> "Gguf":
        """Parse the header; raises `UsageError` when the file is none."""
        blob = memoryview(np.memmap(path, dtype=np.uint8, mode="r"))  # type: ignore[arg-type]  # pages are read when touched
        try:
            return cls._parse(path, blob)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise UsageError(f"{path} is not a readable GGUF file ({error})", hint="download or convert the file again") from error

    @classmethod
    def _parse(cls, path: Path, blob: memoryview) -> "Gguf":
        magic, version, tensor_count, pair_count = struct.unpack_from("<4sIQQ", blob, 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise UsageError(f"{path} is not a GGUF file of version 2 or 3", hint="convert the model with a current llama.cpp")
        at = 24
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key, at = _string(blob, at)
            (kind,) = struct.unpack_from("<I", blob, at)
            metadata[key], at = _value(blob, at + 4, kind)
        table = []
        for _ in range(tensor_count):
            name, at = _string(blob, at)
            (dims,) = struct.unpack_from("<I", blob, at)
            shape = struct.unpack_from(f"<{dims}Q", blob, at + 4)
            tensor_kind, offset = struct.unpack_from("<IQ", blob, at + 4 + 8 * dims)
            at += 16 + 8 * dims
            table.append((name, tuple(reversed(shape)), tensor_kind, offset))
        alignment = metadata.get("general.alignment", 32)
        data = -(-at // alignment) * alignment
        return cls(path, metadata, {name: Entry(name, shape, kind, data + offset) for name, shape, kind, offset in table})

    def tensor(self, name: str) -> Tensor:
        """The tensor in float32, of the shape torch expects."""
        try:
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
            from gguf.quants import dequantize
        except ModuleNotFoundError as error:
            raise MissingExtra("gguf", "hf") from error
        entry = self.tensors[name]
        kind = GGMLQuantizationType(entry.kind)
        block, width = GGML_QUANT_SIZES[kind]
        count = int(np.prod(entry.shape)) // block * width
        raw = np.memmap(self.path, dtype=np.uint8, mode="r", offset=entry.start, shape=(count,))
        values = dequantize(_typed(raw, kind.name).reshape(*entry.shape[:-1], -1), kind)
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(entry.shape)


def _typed(raw: Any, kind: str) -> Any:
    return raw.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))


def _string(blob: memoryview, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", blob, at)
    return str(bytes(blob[at + 8 : at + 8 + length]), "utf-8"), at + 8 + length


def _value(blob: memoryview, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(blob, at)
    if kind != _ARRAY:
        form = "<" + _SCALARS[kind]
        return struct.unpack_from(form, blob, at)[0], at + struct.calcsize(form)
    inner, count = struct.unpack_from("<IQ", blob, at)
    at += 12
    if inner != _STRING:
        form = f"<{count}{_SCALARS[inner]}"
        return struct.unpack_from(form, blob, at), at + struct.calcsize(form)
    for _ in range(count):  # vocabularies and merges are the tokenizer's business: step over them
        at += 8 + struct.unpack_from("<Q", blob, at)[0]
    return count, at


def load_gguf_model(path: Path, *, layers: int | None, dtype: torch.dtype) -> Any:
    """A plain causal model with the file's weights in `dtype`, cut to its first `layers` blocks; never downloads.

    Llama files are read directly (half a second for 135M parameters). Other architectures go through transformers' own
    reader, and their tensors are copied into a fresh model of the same config without a quantisation config.
    """
    file = Gguf.read(path)
    if file.metadata.get("general.architecture") != "llama" or "rope_freqs.weight" in file.tensors:
        return _copy_of_transformers(path, layers=layers, dtype=dtype)
    from transformers import LlamaForCausalLM

    config = _llama_config(file, layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {ours: file.tensor(theirs).to(dtype) for theirs, ours in _ROOT.items() if theirs in file.tensors}
    for block in range(config.num_hidden_layers):
        for theirs, ours in _BLOCK.items():
            weight = file.tensor(f"blk.{block}.{theirs}.weight")
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            state[f"model.layers.{block}.{ours}.weight"] = (_unpermuted(weight, heads) if heads else weight).to(dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    model.tie_weights()
    return model


def _llama_config(file: Gguf, layers: int | None) -> Any:
    from transformers import LlamaConfig

    def of(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"llama.{key}", default)

    heads, width = of("attention.head_count"), of("embedding_length")
    return LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=within(layers, of("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads),
        head_dim=of("attention.key_length", width // heads),
        max_position_embeddings=of("context_length", 2048),
        rms_norm_eps=of("attention.layer_norm_rms_epsilon", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": of("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of the two halves of each head (its rotary embedding pairs neighbours)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _copy_of_transformers(path: Path, *, layers: int | None, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    truncate_config(config, layers)
    try:
        options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    except TypeError:
        options = {}
    read = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, config=config, dtype=dtype, **options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(read.state_dict())
    return plain


def within(layers: int | None, depth: int) -> int:
    """The number of layers to keep of `depth`."""
    if layers is None:
        return depth
    if not 1 <= layers <= depth:
        raise UsageError(f"layers={layers} does not fit a base of {depth} layers", hint=f"choose --layers between 1 and {depth}")
    return layers


def truncate_config(config: Any, layers: int | None) -> None:
    """Keep the first `layers` layers in a transformers config, in place."""
    config.num_hidden_layers = within(layers, config.num_hidden_layers)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := getattr(config, name, None), list):
            setattr(config, name, kinds[: config.num_hidden_layers])
