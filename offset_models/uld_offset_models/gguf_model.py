"""A GGUF file as a plain transformers model in floating point: read once, only the layers asked for, nothing left quantised."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uld_adapters.errors import UsageError
from uld_adapters.gguf_file import Gguf

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
