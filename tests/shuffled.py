"""A model folder under other token ids: the same function, told in another order of rows, with padding rows behind them."""

import json
from pathlib import Path

PADDING = 8


def shuffled(model: Path, folder: Path, *, seed: int = 7) -> Path:
    """Save the model and its tokenizer with all ids permuted, control tokens too."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(model)
    new = np.random.default_rng(seed).permutation(len(tokenizer)).tolist()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {piece: new[token] for piece, token in state["model"]["vocab"].items()}
    state["added_tokens"] = sorted(({**added, "id": new[added["id"]]} for added in state["added_tokens"]), key=lambda added: added["id"])
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        **{f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad")},
    )
    assert other.convert_tokens_to_ids("<|eos|>") == new[tokenizer.eos_token_id]
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [layer.weight.detach().clone() for layer in (made.model.embed_tokens, made.lm_head)]
    made.resize_token_embeddings(len(tokenizer) + PADDING, mean_resizing=False)
    with torch.no_grad():
        for layer, old in zip((made.model.embed_tokens, made.lm_head), rows, strict=True):
            layer.weight[torch.tensor(new)] = old
            layer.weight[len(tokenizer) :] = 9.0  # read by nobody: it would outweigh all tokens
    made.config.bos_token_id, made.config.eos_token_id = other.bos_token_id, other.eos_token_id
    made.config.pad_token_id = other.pad_token_id
    made.generation_config = GenerationConfig.from_model_config(made.config)
    made.save_pretrained(folder)
    other.save_pretrained(folder)
    return folder
