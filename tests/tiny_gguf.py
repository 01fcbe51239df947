"""Write a small Llama model folder as a float32 GGUF file, so that a real llama.cpp serves the very model that a test holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKEN_NORMAL, TOKEN_CONTROL = 1, 3
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def interleave(weight: Any, heads: int) -> Any:
    """Reorder the rows of a query or key projection: transformers rotates halves of a head, llama.cpp rotates neighbours."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """The tensor name that llama.cpp expects for a transformers one."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    stem, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[stem]}.{suffix}"


def write_gguf(model_folder: str | Path, target: str | Path) -> Path:
    """Convert a LlamaForCausalLM folder with a byte-level BPE tokenizer (`tiny.tiny_model`) into one GGUF file."""
    import json

    import numpy as np
    from gguf import GGUFWriter
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = model.config
    writer = GGUFWriter(str(target), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([TOKEN_CONTROL if word in special else TOKEN_NORMAL for word in words])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy().astype(np.float32)
        projection = name.split(".")[-2]
        if projection in heads:
            values = interleave(values, heads[projection])
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(target)


def write_vocabulary(
    target: Path,
    words: Sequence[str],
    merges: Sequence[str] = (),
    *,
    kind: str | None = "gpt2",
    pre: str = "gpt-2",
    control: Sequence[str] = (),
) -> Path:
    """A GGUF file with a tokenizer and no model; the first control token ends an answer. With `kind` None it has no tokenizer."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(str(target), "llama")
    writer.add_name("words")
    if kind is not None:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words)
        writer.add_token_types([TOKEN_CONTROL if word in control else TOKEN_NORMAL for word in words])
        writer.add_token_merges(merges)
        if control:
            writer.add_eos_token_id(words.index(control[0]))
    writer.add_tensor("token_embd.weight", np.zeros((len(words), 8), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
