"""How a tokenizer spells a text: it cuts it into words, and each word into tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
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
    """Spelling by the most probable pieces, for which any neighbour may change all of a word.

    Of spellings with the same pieces in another order ("a", "aa") the model takes one by how its sums are rounded, which depends on
    what stands before the word; that is not followed.
    """

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
    _words: dict[tuple[bytes, bool], tuple[int, ...]] = field(default_factory=dict)

    def encode(self, data: bytes, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of a text; `ended` says that no more of its last word will come."""
        ids: list[int] = []
        words = self.split(data)
        for number, word in enumerate(words):
            ids += self.word(word, ended=ended or number + 1 < len(words))
        return tuple(ids)

    def word(self, word: bytes, *, ended: bool) -> tuple[int, ...]:
        """The ids of a word; `ended` says that no more of it will come."""
        found = self._words.get((word, ended))
        if found is None:
            if len(self._words) > 200_000:
                self._words.clear()
            found = self._words[word, ended] = self.speller.spell(word, ended=ended)
        return found

    def split(self, data: bytes) -> list[bytes]:
        """The words of a text as bytes."""
        (places,) = self.cuts(data)
        return [data[begin:end] for begin, end in pairwise(places)]

    def cuts(self, data: bytes, following: Sequence[str] = ("",)) -> list[tuple[int, ...]]:
        """Where words of a text begin and end, as offsets in bytes, for each of the texts that may follow it."""
        text, widths = readable(data)
        ends = None if len(text) == len(data) else list(accumulate(widths))
        found = []
        for then in following:
            places, at = [0], 0
            for word in self.words(text + then):
                at += len(word)
                if at > len(text):
                    break
                places.append(at if ends is None else ends[at - 1])
            found.append(tuple(places))
        return found

    def divided(self, data: bytes, at: int, following: Sequence[str] = ("",)) -> bool:
        """Whether a word begins at the byte `at` inside a text, whichever of the texts follows it."""
        text, widths = readable(data)
        ends = list(accumulate(widths))
        return at in ends and all(self.words.divides(text + then, ends.index(at) + 1) for then in following)


def plain(tokens: Mapping[int, bytes]) -> dict[bytes, int]:
    """Id by bytes; of tokens with the same bytes the first."""
    found: dict[bytes, int] = {}
    for token, data in tokens.items():
        found.setdefault(data, token)
    return found
