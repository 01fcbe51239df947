"""Any tokenizer file, folder or name as a vocabulary."""

import json
from pathlib import Path
from typing import Any

from uld_adapters.errors import UsageError
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer

KINDS = "a folder with tokenizer.json, a tokenizer.json, tekken.json, tokenizer.model, .tiktoken or .gguf file, a hub or tiktoken name"
_TIKTOKEN = ("o200k_base", "o200k_harmony", "cl100k_base", "p50k_base", "p50k_edit", "r50k_base", "gpt2")


def open_vocabulary(source: Any) -> Vocabulary:
    """Read a vocabulary from whatever holds one; raises `UsageError` or `TokenizerMismatch` for what does not."""
    if isinstance(source, Vocabulary):
        return source
    if not isinstance(source, str | Path):
        return Vocabulary.from_hf(source)
    path = Path(source)
    if path.is_file():
        return _from_file(path)
    if str(source) in _TIKTOKEN:
        return Vocabulary.from_tiktoken(str(source))
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        for name in ("tekken.json", "tokenizer.model"):
            if (path / name).is_file():
                return _from_file(path / name)
    return Vocabulary.from_hf(source, name=str(source))


def _from_file(path: Path) -> Vocabulary:
    if path.suffix == ".gguf":
        return Vocabulary.from_gguf(path)
    if path.suffix == ".tiktoken":
        return Vocabulary.from_tiktoken(path)
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is no tokenizer file: {error}", hint=f"give {KINDS}") from error
        if isinstance(value, dict) and "config" in value and "vocab" in value:
            return Vocabulary.from_tekken(path)
        if not isinstance(value, dict) or "model" not in value:
            raise UsageError(f"{path} is no tokenizer file", hint=f"give {KINDS}")
        from transformers import PreTrainedTokenizerFast

        beside = path.with_name("tokenizer_config.json")
        tokenizer = load_tokenizer(path.parent) if beside.is_file() else PreTrainedTokenizerFast(tokenizer_file=str(path))
        return Vocabulary.from_hf(tokenizer, name=str(path))
    head = path.read_bytes()[:64]
    if head.split(b"\n")[0].count(b" ") == 1 and head.split()[1].isdigit():
        return Vocabulary.from_tiktoken(path)
    return Vocabulary.from_sentencepiece(path)
