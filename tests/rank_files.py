"""Rank files as tiktoken reads them."""

import base64
from pathlib import Path


def ranks_of(words: list[bytes]) -> list[bytes]:
    """Ranks of a small tiktoken-like encoding: all bytes, then what is needed to build the words."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in words:
        tokens += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in tokens]
    return tokens


def rank_file(path: Path, tokens: list[bytes]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)), encoding="utf-8")
    return path
