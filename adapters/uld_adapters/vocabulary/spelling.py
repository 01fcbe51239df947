"""How a tokenizer spells a text: it cuts it into words, and each word into tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from uld_adapters.vocabulary.words import Words, readable


class Speller(Protocol):
    """Spells words (`Bpe`, `Unigram`)."""

    @property
    def unspelled(self) -> bytes:
        """Bytes that no token stands for alone: spellings leave them out."""

    def spell(self, word: bytes, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of a word."""

    def after(self, spelled: tuple[int, ...], ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which ids may follow a spelling within one word."""


class Unigram:
    """Spelling by the most probable pieces, for which any neighbour may change all of a word."""

    def __init__(self, model: Any, tokens: tuple[bytes, ...], space: str) -> None:
        self._model, self._tokens, self._space = model, tokens, space
        single = set(tokens)
        self.unspelled = bytes(byte for byte in range(256) if bytes([byte]) not in single)

    def spell(self, word: bytes, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of a word."""
        text = word.decode(errors="replace").replace(" ", self._space)
        return tuple(token.id for token in self._model.tokenize(text))

    def after(self, spelled: tuple[int, ...], ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Those with which the whole word re-encodes to itself; more than 512 are not tried, and all may follow."""
        if ids.size > 512:
            return np.ones(ids.size, dtype=bool)
        word = b"".join(self._tokens[i] for i in spelled)
        return np.array([self.spell(word + self._tokens[i]) == (*spelled, i) for i in ids.tolist()], dtype=bool)


@dataclass
class Spelling:
    """Words, and how they are spelled. `start` is what the tokenizer puts before every text (a SentencePiece dummy space)."""

    words: Words
    speller: Speller
    start: bytes = b""
    _known: dict[bytes, tuple[int, ...]] = field(default_factory=dict)

    def encode(self, data: bytes, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of a text; `ended` says that no more of its last word will come."""
        ids: list[int] = []
        words = self.split(data)
        for number, word in enumerate(words):
            if ended or number + 1 < len(words):
                known = self._known.get(word)
                if known is None:
                    if len(self._known) > 200_000:
                        self._known.clear()
                    known = self._known[word] = self.speller.spell(word)
                ids += known
            else:
                ids += self.speller.spell(word, ended=False)
        return tuple(ids)

    def split(self, data: bytes, then: str = "") -> list[bytes]:
        """The words of a text as bytes; `then` is what follows it, and stands in the last of them."""
        text, widths = readable(data)
        words = self.words(text + then)
        if then:
            widths = widths + [len(c.encode()) for c in then]
        whole = data + then.encode()
        if len(words) == 1:
            return [whole]
        pieces, at, begin = [], 0, 0
        for word in words:
            at += len(word)
            end = at if len(widths) == len(whole) else begin + sum(widths[at - len(word) : at])
            pieces.append(whole[begin:end])
            begin = end
        return pieces


def cuts(words: list[bytes]) -> set[int]:
    """Where words begin and end, as offsets in bytes."""
    at, found = 0, {0}
    for word in words:
        at += len(word)
        found.add(at)
    return found


def plain(tokens: Mapping[int, bytes]) -> dict[bytes, int]:
    """Id by bytes; of tokens with the same bytes the first."""
    found: dict[bytes, int] = {}
    for token, data in tokens.items():
        found.setdefault(data, token)
    return found
