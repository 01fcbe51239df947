"""The header of a GGUF file, and its tensors one by one: nothing is read that is not asked for."""

import json
import os
import shutil
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from uld_adapters.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# llama.cpp's names for byte-level BPE that cuts every digit off by itself before merging.
_ONE_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
# Its names for those that take a whole word which is a token as that token, whatever the merges say.
_WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken", "youtu"}
)
_MAGIC = b"GGUF"
_GIVE_TOKENIZER = "give the model's own tokenizer.json, or a GGUF file with a byte-level BPE or SentencePiece tokenizer"


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
        try:  # pages are read when touched
            return cls._parse(path, memoryview(np.memmap(path, dtype=np.uint8, mode="r")))  # type: ignore[arg-type]
        except (struct.error, ValueError, KeyError) as error:  # an empty file cannot be mapped
            reason = "it is cut short" if isinstance(error, struct.error) else error
            raise UsageError(f"{path} is not a readable GGUF file ({reason})", hint="download or convert the file again") from error

    @classmethod
    def _parse(cls, path: Path, blob: memoryview) -> "Gguf":
        magic, version, tensor_count, pair_count = struct.unpack_from("<4sIQQ", blob, 0)
        if magic != _MAGIC or version not in (2, 3):
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

    def tensor(self, name: str) -> "Tensor":
        """The tensor in float32, of the shape torch expects."""
        import torch

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


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or by its first bytes: Ollama's blobs have no suffix."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def gguf_tokenizer(path: Path) -> Any:
    """Transformers reads tokens and merges out of a GGUF file, but not how text is cut and merged: mend that.

    Raises `UsageError` when the file holds no tokenizer, or one that transformers cannot build.
    """
    from tokenizers import pre_tokenizers

    metadata = Gguf.read(path).metadata
    tokenizer = _read_tokenizer(path, metadata.get("tokenizer.ggml.model"))
    _drop_foreign(tokenizer, metadata["tokenizer.ggml.tokens"])
    if metadata.get("tokenizer.ggml.pre") in _ONE_DIGIT:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def _read_tokenizer(path: Path, kind: str | None) -> Any:
    """The file's tokenizer, read from a folder of its own: transformers prefers tokenizer files that lie beside a GGUF."""
    from transformers import PreTrainedTokenizerFast

    if kind is None:
        raise UsageError(f"{path} holds no tokenizer", hint=_GIVE_TOKENIZER)
    with TemporaryDirectory(prefix="uld-") as folder:
        try:
            _link(path.resolve(), Path(folder, "model.gguf"))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf")
        except Exception as error:  # transformers and tokenizers raise what comes to hand, a bare Exception among it
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"the tokenizer of {path}, of kind {kind!r}, cannot be read: {reason}", hint=_GIVE_TOKENIZER) from error
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path.parent)
    return tokenizer


def _link(path: Path, place: Path) -> None:
    for make in (os.symlink, os.link):  # Windows lets few users make symbolic links
        with suppress(OSError):
            make(path, place)
            return
    shutil.copyfile(path, place)


def _drop_foreign(tokenizer: Any, count: int) -> None:
    """Drop what transformers' class adds beyond the file's own tokens (GPT-2's `<|endoftext|>`): the model has no row for it."""
    from tokenizers import Tokenizer

    if all(token < count for token in tokenizer.added_tokens_decoder):
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


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
