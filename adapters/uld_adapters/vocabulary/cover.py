"""Where a text may stand in a vocabulary's tokens when more text follows: the spellings whose last token reaches beyond its end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from uld_adapters.errors import TokenizerMismatch
from uld_adapters.vocabulary.bpe import Bpe
from uld_adapters.vocabulary.index import TokenIndex
from uld_adapters.vocabulary.spelling import cuts
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_adapters.vocabulary.words import ends_inside_character, whole

T = TypeVar("T")
# What may follow a text and move the cuts at its end: letters, spaces, breaks, digits, contractions, marks, other scripts.
_PROBES = ("", "a", "S", " ", " a", "\n", "1", ".", "'", "'s", "e", "t", "\u0301", "漢", "😀")
_KEPT = 100_000
_LONG = 48  # bytes of a word without cuts, beyond which its certain tokens are let go


@dataclass(frozen=True)
class Overhang:
    """Spellings of a text that end in the middle of a token: `path` spells its first `at` bytes, any of `ids` all the rest and more."""

    path: tuple[int, ...]
    at: int
    ids: Int[np.ndarray, " n"]


class Covers:
    """The open end of texts in one vocabulary.

    A text is held as its tail, which begins where it is certain that a token begins. The cover of a tail is `path(tail)`, which
    ends where the tail ends, and `overhangs(tail)`. Each is canonical: some longer text is spelled like this. For a token that
    ends at a given byte the tokens before it are always the text's own spelling up to there, so there is one path a byte.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        spelling = vocabulary.spelling
        if spelling is None:
            raise TokenizerMismatch(
                f"it is not known how {vocabulary.name or 'this tokenizer'} splits text", hint="give its tokenizer, or use the mode 'path'"
            )
        self.vocabulary, self.spelling = vocabulary, spelling
        self.tokens = vocabulary.tokens
        speller = spelling.speller
        if isinstance(speller, Bpe):
            usable = speller.reachable | set(speller.whole.values())
        else:
            usable = frozenset(range(vocabulary.rows))
        self.index = TokenIndex(vocabulary.tokens, (i for i in usable if i not in vocabulary.control))
        self._borders: dict[bytes, tuple[int, frozenset[int]]] = {}
        self._overhangs: dict[bytes, tuple[Overhang, ...]] = {}
        self._paths: dict[bytes, tuple[int, ...]] = {}

    def path(self, tail: bytes) -> tuple[int, ...]:
        """The spelling of a tail that ends with it."""
        return remembered(self._paths, tail, lambda: self.spelling.encode(tail))

    def advance(self, tail: bytes) -> tuple[tuple[int, ...], bytes]:
        """The tokens of a tail that are certain whatever follows, and the tail that is left."""
        start, _ = self._cuts(tail)
        if start:
            return self.path(tail[:start]), tail[start:]
        if len(tail) > _LONG:
            return self._let_go(tail)
        return (), tail

    def _let_go(self, tail: bytes) -> tuple[tuple[int, ...], bytes]:
        """A word without cuts keeps its open end only: the first tokens that all covers share are certain."""
        covers = [self.path(tail), *(overhang.path for overhang in self.overhangs(tail))]
        shared = next((i for i, column in enumerate(zip(*covers, strict=False)) if len(set(column)) > 1), min(map(len, covers)))
        size = sum(len(self.tokens[i]) for i in covers[0][:shared])
        rest = tail[size:]
        if not size or cuts(self.spelling.split(rest)) != {at - size for at in cuts(self.spelling.split(tail)) if at >= size}:
            return (), tail
        return covers[0][:shared], rest

    def overhangs(self, tail: bytes) -> tuple[Overhang, ...]:
        """The spellings of a tail that end beyond it."""
        return remembered(self._overhangs, tail, lambda: tuple(self._find(tail)))

    def _find(self, tail: bytes) -> list[Overhang]:
        start, possible = self._cuts(tail)
        head = self.path(tail[:start])
        found = []
        for at in range(max(start, len(tail) - self.index.longest + 1), len(tail)):
            ids = self.index.beyond(tail[at:])
            if not ids.size:
                continue
            within = self.spelling.encode(tail[start:at], ended=at in possible)
            if within and at not in possible:
                ids = ids[self.spelling.speller.after(within, ids)]
            if ids.size:
                found.append(Overhang((*head, *within), at, ids))
        return found

    def _cuts(self, tail: bytes) -> tuple[int, frozenset[int]]:
        """The last place before the end where a word certainly begins, and all places where one may."""
        if self.spelling.words is whole:
            return 0, frozenset({0})
        return remembered(self._borders, tail, lambda: self._probe(tail))

    def _probe(self, tail: bytes) -> tuple[int, frozenset[int]]:
        size = len(tail)
        seen = [{at for at in cuts(self.spelling.split(tail, probe)) if at < size} for probe in _PROBES] if size else [{0}]
        certain, possible = set.intersection(*seen), set.union(*seen)
        if ends_inside_character(tail):
            first = next(at for at in range(size - 1, -1, -1) if tail[at] & 0xC0 != 0x80)
            certain.discard(first) if first else None
            possible.add(first)
        return max(certain, default=0), frozenset(possible)

    def onward(self, tail: bytes, data: bytes) -> tuple[tuple[int, ...], list[Overhang]]:
        """The cover of a tail with more bytes after it: its path, and its overhangs."""
        if tail and data and self.sealed(tail, data):
            base, size = self.path(tail), len(tail)
            found = [Overhang((*base, *o.path), o.at + size, o.ids) for o in self.overhangs(data)]
            return (*base, *self.path(data)), found
        return self.path(tail + data), list(self.overhangs(tail + data))

    def sealed(self, tail: bytes, data: bytes) -> bool:
        """Whether it is certain that a token ends between the tail and the bytes that follow it."""
        for overhang in self.overhangs(tail):
            rest = tail[overhang.at :]
            for low, high in self.index.touching(rest + data):
                if any(len(self.index.keys[i]) > len(rest) for i in (low, high - 1)):
                    return False
        return True


def remembered(kept: dict[bytes, T], key: bytes, make: Callable[[], T]) -> T:
    """What was made for the key before, or is made now; a memory that grows too large begins anew."""
    found = kept.get(key)
    if found is None:
        if len(kept) >= _KEPT:
            kept.clear()
        found = kept[key] = make()
    return found
