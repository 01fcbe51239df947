"""A tokenizer as bytes: id -> bytes, control ids, rows, and a fingerprint over them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from uld_adapters.errors import TokenizerMismatch

# Text on which tokenizers are compared by segmentation: prose, code, digits, contractions, CJK, emoji, marks, chat markup.
CORPUS = (
    "The quick brown fox doesn't jump; she'll wait, won't she?",
    "def f(x):\n\tif x  >  10:\n        return {'a': [1, 22, 333, 4444, 123456789012]}\r\n",
    "漢字とかな交じり文。한국어 텍스트. Ελληνικά, кириллица, العربية.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 é é ñ ñ  two  spaces   three ",
    "<s> [INST] hello [/INST] </s> <|user|> not a control token",
)

# llama.cpp's names for byte-level BPE that cuts every digit off by itself before merging.
_ONE_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level BPE writes for bytes (the GPT-2 convention), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)})
    return alphabet


def _piece_bytes(piece: str, *, byte_level: bool) -> bytes:
    if byte_level:
        alphabet = _byte_alphabet()
        return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens: `tokens[id]` as bytes, control ids apart, and how many rows of the head are real.

    The fingerprint is a SHA-256 over the tokens, the control ids and the segmentation of a fixed corpus: two tokenizers
    with one fingerprint give the same ids to the same text.
    """

    tokens: tuple[bytes, ...]
    control: frozenset[int]
    fingerprint: str

    @property
    def rows(self) -> int:
        """How many tokens there are, control tokens included."""
        return len(self.tokens)

    @classmethod
    def from_hf(cls, tokenizer: Any) -> "Vocabulary":
        """Read a transformers fast tokenizer (byte-level BPE or SentencePiece-like)."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        byte_level = "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
        added = {int(i): t for i, t in tokenizer.added_tokens_decoder.items()}
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        tokens = tuple(
            str(added[i].content).encode() if i in added else _piece_bytes(p or "", byte_level=byte_level) for i, p in enumerate(pieces)
        )
        control = frozenset(i for i, t in added.items() if t.special)
        digest = hashlib.sha256()
        for i, token in enumerate(tokens):
            digest.update(len(token).to_bytes(4, "big") + token + (b"c" if i in control else b"t"))
        for text in CORPUS:
            digest.update(json.dumps(tokenizer.encode(text, add_special_tokens=False)).encode())
        return cls(tokens, control, digest.hexdigest())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over id -> bytes, control ids and the segmentation of a fixed corpus."""
    return Vocabulary.from_hf(tokenizer).fingerprint


def _from_gguf(path: Path) -> Any:
    """Transformers reads tokens and merges out of a GGUF file, but not how text is cut before merging: mend that."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from uld_adapters.gguf_file import Gguf

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if Gguf.read(path).metadata.get("tokenizer.ggml.pre") in _ONE_DIGIT:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return tokenizer


def load_tokenizer(source: Any) -> Any:
    """A transformers fast tokenizer from an object, a folder, a GGUF file or a hub name."""
    if not isinstance(source, str | Path):
        return source
    from transformers import AutoTokenizer

    path = Path(source)
    try:
        if path.suffix == ".gguf":
            return _from_gguf(path)
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise TokenizerMismatch(
            f"no tokenizer could be loaded from {str(source)!r}: {str(error).splitlines()[0]}",
            hint="pass tokenizer=... as a folder with tokenizer.json, a GGUF file or a hub name",
        ) from error


def ends_inside_character(data: bytes) -> bool:
    """Whether the bytes stop in the middle of a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        width = 4 if byte >> 3 == 0b11110 else 3 if byte >> 4 == 0b1110 else 2 if byte >> 5 == 0b110 else 1
        return width > back
    return False


def end_token_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: the end token and the end-of-turn tokens that chat templates use."""
    names: Sequence[str] = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    vocabulary = tokenizer.get_added_vocab()
    ids.update(vocabulary[name] for name in names if name in vocabulary)
    return frozenset(ids)
