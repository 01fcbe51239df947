"""A tokenizer and a random Llama small enough to be built inside a test, saved as ordinary model folders."""

import json
from pathlib import Path
from typing import Any

SPECIALS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' if message['role'] == 'assistant' else '' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CORPUS = (
    "The lighthouse on the northern island was built of grey stone and its lamp could be seen for twenty miles.",
    "What is the name of the river that runs through the old town? It is called the Amber, and it freezes in winter.",
    "A quick brown fox jumps over the lazy dog while the farmer counts 1234567890 apples in the orchard.",
    "Who wrote the book about the sea? The book was written by a captain who had sailed around the world.",
    "How many moons does the planet have? The planet has two moons, one of them larger than the other.",
    "Café, naïve, Zürich and Þórr: words with letters from elsewhere, 東京 and Москва, smile 😀 and snow ☃.",
    "In the morning the baker opens the shop; in the evening the singer closes the theatre with a song.",
    "def area(width, height):\n    return width * height\n",
)


def tiny_tokenizer(path: str | Path, *, vocab_size: int = 400, bos: bool = False) -> Any:
    """Train a byte-level BPE tokenizer on a few sentences and save it; `bos` puts <|bos|> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", raw.token_to_id("<|bos|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return tokenizer


def lowering(folder: Path) -> Path:
    """Make the tokenizer in a folder write all in lower case."""
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    return folder


def tiny_model(
    path: str | Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    vocab_size: int = 400,
    bos: bool = False,
    scale: float = 20.0,
    context: int = 512,
) -> Path:
    """Save a random LlamaForCausalLM with its tokenizer, loadable by `from_pretrained`; `scale` widens the logits.

    An untouched random model is nearly uniform over the vocabulary; widening the output rows makes it prefer a few tokens,
    as trained models do.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = Path(path)
    tokenizer = tiny_tokenizer(path, vocab_size=vocab_size, bos=bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float().eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
    model.save_pretrained(path)
    return path
