"""Any tokenizer file, folder or name: as a vocabulary, or as what a target's tokenizer is used as."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from uld_adapters.errors import UsageError
from uld_adapters.gguf_file import is_gguf
from uld_adapters.vocabulary.plain_tokenizer import PlainTokenizer
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer

KINDS = "a folder with tokenizer.json, a tokenizer.json, tekken.json, tokenizer.model, .tiktoken or .gguf file, a hub or tiktoken name"
_TIKTOKEN = re.compile(r"(?:r50k|p50k|cl100k|o200k)_\w+\Z")  # names of encodings
_HUB = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?\Z")  # names that the hub takes
_FILES = (".json", ".model", ".tiktoken", ".gguf")


def open_vocabulary(source: Any) -> Vocabulary:
    """Read a vocabulary from whatever holds one, with the rows of the model's head where a model lies beside it.

    Raises `UsageError` or `TokenizerMismatch` for what holds none.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and is_gguf(path):
        return Vocabulary.from_gguf(path)
    found = _opened(source)
    made = found if isinstance(found, Vocabulary) else Vocabulary.from_hf(found, name="" if path is None else str(path))
    return made if path is None or made.head_rows else replace(made, head_rows=_head_rows(path / "config.json"))


def _head_rows(config: Path) -> int:
    """The rows of the head of the model whose configuration this is, 0 where there is none."""
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    places = (value, value.get("text_config")) if isinstance(value, dict) else ()
    sizes = [place.get("vocab_size") for place in places if isinstance(place, dict)]
    return next((size for size in sizes if isinstance(size, int)), 0)


def open_tokenizer(source: Any) -> Any:
    """A target's tokenizer: a transformers one where there is one, else its vocabulary as a `PlainTokenizer`; raises likewise."""
    found = _opened(source)
    return PlainTokenizer(found) if isinstance(found, Vocabulary) else found


def _opened(source: Any) -> Any:
    """A transformers tokenizer, or the vocabulary of what is none: tiktoken's, SentencePiece's and Mistral's files by their content."""
    if not isinstance(source, str | Path):
        return source
    if not str(source):
        raise UsageError("the name of a tokenizer is empty", hint=f"give {KINDS}")
    path = Path(source)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        told = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        plain = [path / name for name in ("tekken.json", "tokenizer.model") if (path / name).is_file()]
        return load_tokenizer(path) if told or not plain else _from_file(plain[0])
    if path.suffix in _FILES:
        raise UsageError(f"there is no file {path}", hint=f"give {KINDS}")
    if not _HUB.match(str(source)):
        raise UsageError(f"there is no file or folder {path}", hint=f"give {KINDS}")
    return Vocabulary.from_tiktoken(str(source)) if _TIKTOKEN.match(str(source)) else load_tokenizer(source)


def _from_file(path: Path) -> Any:
    if is_gguf(path):
        return load_tokenizer(path)
    with path.open("rb") as file:
        head = file.read(256)
    if path.suffix == ".json":
        return _from_json(path)
    row = head.split(b"\n")[0].split()
    ranks = len(row) == 2 and row[1].isdigit()
    if ranks or path.suffix == ".tiktoken":
        return Vocabulary.from_tiktoken(path)
    try:
        return Vocabulary.from_sentencepiece(path)
    except UsageError as error:
        if path.suffix == ".model":
            raise
        raise UsageError(f"{path} is no tokenizer file", hint=f"give {KINDS}") from error


def _from_json(path: Path) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no tokenizer file: {error}", hint=f"give {KINDS}") from error
    if isinstance(value, dict) and "config" in value and "vocab" in value:
        return Vocabulary.from_tekken(path)
    if not isinstance(value, dict) or "model" not in value:
        raise UsageError(f"{path} is no tokenizer file", hint=f"give {KINDS}")
    if path.with_name("tokenizer_config.json").is_file():
        return load_tokenizer(path.parent)
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise UsageError(f"{path} is no tokenizer file: {error}", hint=f"give {KINDS}") from error
