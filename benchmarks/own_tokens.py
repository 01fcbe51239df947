"""A small model with byte-pair tokens of its own: the first layers of SmolLM2, whose embeddings are those of its tokens' pieces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uld_offset_models.assistant import load_base, load_base_tokenizer

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def own_vocabulary(texts: Sequence[str], size: int, model: Path) -> Any:
    """A byte-level tokenizer trained on a few texts, with the control tokens and the template of the model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=CONTROL[1], eos_token=CONTROL[2], additional_special_tokens=CONTROL[:1])
    made.chat_template = load_base_tokenizer(model).chat_template
    return made


def own_base(folder: Path, tokenizer: Any, model: Path, *, layers: int) -> Path:
    """The model's first layers with other tokens, as a folder that `train` takes for its base.

    A token's embedding is that of the model's own token with its bytes, else the mean over its pieces in the model's tokens, and for
    bytes that the model does not have the mean of all.
    """
    base, tokens = load_base(model)
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = layers
    old, known, pieces = base.get_input_embeddings().weight.detach(), tokens.get_vocab(), tokens.backend_tokenizer.model
    rows = old.mean(0).repeat(len(tokenizer), 1)
    for name, row in tokenizer.get_vocab().items():
        found = [known[name]] if name in known else [piece.id for piece in pieces.tokenize(name)]
        if found:
            rows[row] = old[torch.tensor(found)].mean(0)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.get_input_embeddings().weight.data.copy_(rows)
    for role in ("bos", "eos", "pad"):
        setattr(base.config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
