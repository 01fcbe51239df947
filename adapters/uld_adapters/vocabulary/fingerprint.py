"""What two tokenizers must share to be taken for one."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

# Text on which tokenizers are compared by segmentation: prose, code, digits, contractions, CJK, emoji, marks, chat markup.
CORPUS = (
    "The quick brown fox doesn't jump; she'll wait, won't she?",
    "def f(x):\n\tif x  >  10:\n        return {'a': [1, 22, 333, 4444, 123456789012]}\r\n",
    "漢字とかな交じり文。한국어 텍스트. Ελληνικά, кириллица, العربية.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 é é ñ ñ  two  spaces   three ",
    "<s> [INST] hello [/INST] </s> <|user|> not a control token",
)


def letters_changed(normalisers: Iterable[str]) -> list[str]:
    """Those of the steps before a text is cut that change its letters; what NFC composes looks the same."""
    return [name for name in normalisers if name != "NFC"]


def fingerprint_of(
    tokens: Sequence[bytes], control: frozenset[int], encode: Callable[[str], list[int]], normalisers: Iterable[str] = ()
) -> str:
    """SHA-256 over id -> bytes, control ids, the segmentation of a fixed corpus, and whether letters are changed."""
    digest = hashlib.sha256()
    for i, token in enumerate(tokens):
        digest.update(len(token).to_bytes(4, "big") + token + (b"c" if i in control else b"t"))
    for text in CORPUS:
        digest.update(json.dumps(encode(text)).encode())
    if letters_changed(normalisers):
        digest.update(b"letters changed")
    return digest.hexdigest()
