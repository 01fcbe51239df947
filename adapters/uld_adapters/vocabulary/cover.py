"""Where a text may stand in a vocabulary's tokens when more text follows: the spellings whose last token reaches beyond its end."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from uld_adapters.errors import TokenizerMismatch
from uld_adapters.vocabulary.bpe import Bpe
from uld_adapters.vocabulary.index import TokenIndex
from uld_adapters.vocabulary.memory import Memory
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_adapters.vocabulary.words import completions, unfinished, whole

Split = tuple[int, ...]  # where words begin and end
# What may follow a text and move the cuts at its end: letters, spaces, breaks, digits, contractions, marks, other scripts.
_PROBES = ("", "a", "S", " ", " a", "\n", "1", ".", "'", "'s", "e", "t", "l", "\u0301", "漢", "😀")
_BEYOND = ("", "a", " ", "1")
_AFTER, _NEAR = ("", "s", "e", "l", "1", " a", "\n"), 3  # what may move a cut that lies no more than three bytes back
_WIDE = 16
_LONG = 48  # bytes of a word without cuts, beyond which its certain tokens are let go


class Overhang(NamedTuple):
    """Spellings of a text that end in the middle of a token: `path` spells its first `at` bytes, any of `ids` all the rest and more."""

    path: tuple[int, ...]
    at: int
    ids: Int[np.ndarray, " n"]


class Covers:
    """The open end of texts in one vocabulary.

    A text is held as its tail, which begins where it is certain that a token begins. The cover of a tail are its `paths`, which
    end where the tail ends, and its `overhangs`. Each is canonical: some longer text is spelled like this. Where words are cut
    depends on what follows (of two spaces, one goes to the next word), so a tail has a few splits. In each there is one spelling
    up to a given byte: that of the words before it, and of the last one as far as it goes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        spelling = vocabulary.spelling
        if spelling is None:
            raise TokenizerMismatch(
                f"it is not known how {vocabulary.name or 'this tokenizer'} splits text", hint="give its tokenizer, or use the mode 'path'"
            )
        self.vocabulary, self.spelling = vocabulary, spelling
        self.tokens = vocabulary.tokens
        self._unspelled = spelling.speller.unspelled
        speller = spelling.speller
        if isinstance(speller, Bpe):
            usable = speller.reachable | set(speller.whole.values())
            self._alone = usable > speller.reachable  # some tokens appear only as words of their own
        else:
            usable = frozenset(range(vocabulary.rows))
            self._alone = False
        self.index = TokenIndex(vocabulary.tokens, (i for i in usable if i not in vocabulary.control))
        self._splits = Memory(self._probe)
        self._overhangs = Memory(self._find)
        self._paths = Memory(self._spelled)
        self._sealed = Memory(self._cut_between)
        self._beyond = Memory(self.index.beyond)
        self._fits = Memory(self._fit)
        self._matrix = np.frombuffer(b"".join(t[:_WIDE].ljust(_WIDE, b"\0") for t in self.tokens), dtype=np.uint8).reshape(-1, _WIDE)

    def written(self, data: bytes) -> bytes:
        """What of a text its spelling has: bytes without a token are left out."""
        return data.translate(None, self._unspelled) if self._unspelled else data

    def path(self, tail: bytes) -> tuple[int, ...]:
        """The spelling of a tail that ends with it."""
        return self.paths(tail)[0]

    def paths(self, tail: bytes) -> tuple[tuple[int, ...], ...]:
        """How a tail may be spelled up to its end; the first is how it is spelled if the text ends there."""
        return self._paths[tail]

    def _spelled(self, tail: bytes) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(self._spell(tail, split, len(tail))[0] for split in self.splits(tail)))

    def _spell(self, tail: bytes, split: Split, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of the tail's first `end` bytes in a split, and those of its last word if that goes on."""
        ids: list[int] = []
        begin = 0
        for cut in split:
            if begin < cut <= end:
                ids += self.spelling.word(tail[begin:cut], ended=True)
                begin = cut
        word = self.spelling.word(tail[begin:end], ended=False) if begin < end else ()
        return (*ids, *word), word

    def advance(self, tail: bytes, data: bytes) -> tuple[tuple[int, ...], bytes]:
        """The tokens of a tail with more bytes after it that are certain whatever follows, and the tail that is left."""
        if tail and data and self.spelling.words is not whole and len(self.paths(tail)) == 1 and self.sealed(tail, data):
            certain, rest = self.advance(b"", data)  # its cuts are mostly known, those of both together seldom
            return (*self.path(tail), *certain), rest
        tail += data
        start = self._certain(tail)
        if start:
            return self._spell(tail, self.splits(tail)[0], start)[0], tail[start:]
        if len(tail) > _LONG:
            return self._let_go(tail)
        return (), tail

    def _let_go(self, tail: bytes) -> tuple[tuple[int, ...], bytes]:
        """A word without cuts keeps its open end only: the first tokens that all covers share are certain."""
        covers = [*self.paths(tail), *(overhang.path for overhang in self.overhangs(tail))]
        shared = next((i for i, column in enumerate(zip(*covers, strict=False)) if len(set(column)) > 1), min(map(len, covers)))
        size = sum(len(self.tokens[i]) for i in covers[0][:shared])
        rest = tail[size:]
        (before,), (after,) = self.spelling.cuts(tail), self.spelling.cuts(rest)
        if not size or set(after) != {at - size for at in before if at >= size}:
            return (), tail
        return covers[0][:shared], rest

    def overhangs(self, tail: bytes) -> tuple[Overhang, ...]:
        """The spellings of a tail that end beyond it."""
        return self._overhangs[tail]

    def _find(self, tail: bytes) -> tuple[Overhang, ...]:
        found: dict[tuple[tuple[int, ...], int], Int[np.ndarray, " n"]] = {}
        splits, begin = self.splits(tail), max(self._certain(tail), len(tail) - self.index.longest + 1)
        for at in range(begin, len(tail)):
            ids = self._beyond[tail[at:]]
            if not ids.size:
                continue
            for split in dict.fromkeys(tuple(cut for cut in split if cut <= at) for split in splits):
                path, word = self._spell(tail, split, at)
                fit = self._after(word, tail[at:]) if word else ids
                if fit.size:
                    known = found.get((path, at))
                    found[path, at] = fit if known is None or known is fit else self._either(ids, known, fit)
        return tuple(Overhang(path, at, ids) for (path, at), ids in found.items())

    def _after(self, word: tuple[int, ...], rest: bytes) -> Int[np.ndarray, " n"]:
        """Which of the tokens beyond the bytes `rest` may follow within a word."""
        if isinstance(self.spelling.speller, Bpe):
            return self._fits[word[-1:], rest]  # what stands before its last token does not matter
        return self._fit((word, rest))

    def _fit(self, key: tuple[tuple[int, ...], bytes]) -> Int[np.ndarray, " n"]:
        word, rest = key
        ids = self._beyond[rest]
        return ids[self.spelling.speller.after(word, ids)]

    def _either(self, ids: Int[np.ndarray, " n"], some: Int[np.ndarray, " m"], others: Int[np.ndarray, " k"]) -> Int[np.ndarray, " l"]:
        """Those of the ids that are among some of them, or among others."""
        here = np.zeros(len(self.tokens), dtype=bool)
        here[some] = here[others] = True
        return ids[here[ids]]

    def bytes_at(self, ids: Int[np.ndarray, " n"], at: int) -> set[int]:
        """The bytes that tokens, all longer than `at`, have there."""
        if at >= _WIDE:
            return {self.tokens[i][at] for i in ids.tolist()}
        return set(np.bincount(self._matrix[ids, at]).nonzero()[0].tolist())

    def _certain(self, tail: bytes) -> int:
        """The last place before the end where a word begins whatever follows."""
        splits = self.splits(tail)
        return next((at for at in reversed(splits[0]) if at < len(tail) and all(at in split for split in splits)), 0)

    def splits(self, tail: bytes) -> tuple[Split, ...]:
        """How the tail may be cut into words, by what follows it; the first is how it is cut if the text ends there."""
        if self.spelling.words is whole or not tail:
            return ((0, len(tail)), (0,))
        return self._splits[tail]

    def _probe(self, tail: bytes) -> tuple[Split, ...]:
        # What an unfinished character becomes decides how the words before it are cut, and whether one begins with it.
        open_ = unfinished(tail)
        known = tail[: len(tail) - open_]
        probes = [char + more for char in completions(tail[-open_:]) for more in _BEYOND] if open_ else _PROBES
        found = self.spelling.cuts(known, probes)
        if open_ and known:  # patterns may name single characters, so that no sample of them tells whether one is cut off
            found += [(*split, len(known)) if split[-1] < len(known) else split[:-1] for split in found]
        return tuple(dict.fromkeys(found))

    def sealed(self, tail: bytes, data: bytes) -> bool:
        """Whether a tail and the bytes that follow it are spelled apart, whatever comes after them."""
        if self.spelling.words is not whole:
            near = data[:_NEAR]
            return self._sealed[tail, near if near.isascii() else data]
        for overhang in self.overhangs(tail):
            rest = tail[overhang.at :]
            for low, high in self.index.touching(rest + data):
                if any(len(self.index.keys[i]) > len(rest) for i in (low, high - 1)):
                    return False
        return not self._alone

    def _cut_between(self, key: tuple[bytes, bytes]) -> bool:
        tail, data = key
        if unfinished(tail):
            return False
        open_ = unfinished(data)
        if open_ == len(data):  # which character it becomes decides
            return False
        known = tail + data[: len(data) - open_]
        if data[:1] in b" \n" and data[1:2].isalpha() and data.isascii():  # a letter after a space: nothing moves the cut before both
            return self.spelling.divided(known, len(tail))
        probes = [char + more for char in completions(data[-open_:]) for more in _BEYOND] if open_ else _AFTER
        return self.spelling.divided(known, len(tail), probes)
