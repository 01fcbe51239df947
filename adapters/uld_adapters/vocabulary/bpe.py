"""Byte-pair encoding over token ids: how a word is spelled, and which tokens may stand side by side in a spelling."""

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

ATOM = -1  # rank of what no merge makes
NEVER = np.iinfo(np.int32).max
_LONG = 64  # symbols of a word, beyond which a heap finds its merges sooner than a look at all of them


def implied_merges(tokens: Sequence[bytes], order: Iterable[int]) -> list[tuple[int, int, int]]:
    """The merges of a vocabulary that is given as ranks only: any two tokens whose bytes join to a token, in that token's order."""
    known: dict[bytes, int] = {}
    merges = []
    for token in order:
        data = tokens[token]
        for cut in range(1, len(data)):
            left, right = known.get(data[:cut]), known.get(data[cut:])
            if left is not None and right is not None:
                merges.append((left, right, token))
        known.setdefault(data, token)
    return merges


class Bpe:
    """Spelling by merges (left, right, joined), best first, from the ids of single symbols.

    `atoms` are the ids that bytes or characters start as. Each token keeps the one merge by which its own bytes become it.
    Two tokens are neighbours in some spelling only if the pair re-encodes to itself, which is read off the merges that reach
    across: with P the rank at which a part is merged away, an r that ends the left token and an l that begins the right one
    join when a merge (r, l) has rank m < P(r), m <= P(l). `unspelled` are the bytes that have no id of their own.
    """

    def __init__(
        self, size: int, atoms: Mapping[bytes, int], merges: Iterable[tuple[int, int, int]], *, whole: Mapping[bytes, int]
    ) -> None:
        self.size = size
        self.atoms = dict(atoms)
        self.whole = dict(whole)  # words that are tokens whatever the merges say
        self.rank = [ATOM] * size
        self.left, self.right = [ATOM] * size, [ATOM] * size
        self._pairs: dict[int, int] = {}
        symbols = set(self.atoms.values())
        for rank, (left, right, joined) in enumerate(merges):
            if self.left[joined] == ATOM and joined not in symbols and self._apart(left, right, NEVER):
                self.rank[joined], self.left[joined], self.right[joined] = rank, left, right
                self._pairs[left * size + right] = joined
        self.unspelled = bytes(byte for byte in range(256) if bytes([byte]) not in self.atoms)
        self.reachable = frozenset(symbols | {joined for joined in self._pairs.values()})
        self._tables()

    def order(self, tokens: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], set[bytes]]:
        """What decides how words are spelled, whatever the ids: the merges by bytes, best first, and the tokens that are words only."""
        joined = sorted(self._pairs.values(), key=lambda token: self.rank[token])
        alone = {data for data, token in self.whole.items() if token not in self.reachable}
        return [(tokens[self.left[token]], tokens[self.right[token]]) for token in joined], alone

    def _tables(self) -> None:
        """Left spines of all tokens with the ranks at which they end, and the merges sorted by their left part."""
        left = np.append(np.array(self.left, dtype=np.int32), ATOM)
        left[left == ATOM] = self.size
        rank = np.append(np.array(self.rank, dtype=np.int32), NEVER - 1)
        spine, ends = [np.arange(self.size, dtype=np.int32)], [np.full(self.size, NEVER - 1, dtype=np.int32)]
        while (spine[-1] != self.size).any():
            ends.append(rank[spine[-1]])
            spine.append(left[spine[-1]])
        self._spine, self._ends = np.stack(spine, 1), np.stack(ends, 1)
        joined = np.fromiter(self._pairs.values(), dtype=np.int32, count=len(self._pairs))
        order = np.argsort(left[joined], kind="stable")
        self._joined = joined[order]
        self._starts = np.searchsorted(left[self._joined], np.arange(self.size + 1))
        self._right = np.array(self.right, dtype=np.int32)
        self._rank = rank
        self._scratch = np.full(self.size + 1, NEVER, dtype=np.int32)

    def _apart(self, left: int, right: int, limit: int) -> bool:
        """Whether no merge of rank below `limit` reaches across the two."""
        pairs, rank = self._pairs, self.rank
        while True:
            joined = pairs.get(left * self.size + right)
            if joined is not None and rank[joined] < limit:
                return False
            if rank[left] > rank[right]:
                limit, left = rank[left], self.right[left]
            elif rank[right] == ATOM:
                return True
            else:
                limit, right = rank[right] + 1, self.left[right]

    def after(self, spelled: Sequence[int], ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the ids may follow the last token of a spelling within one word."""
        left = spelled[-1]
        if ids.size < 24:
            return np.fromiter((self._apart(left, i, NEVER) for i in ids.tolist()), dtype=bool, count=ids.size)
        scratch, touched = self._scratch, []
        part, ends = left, NEVER
        while part != ATOM:
            joined = self._joined[self._starts[part] : self._starts[part + 1]]
            ranks = self._rank[joined]
            alive = ranks < ends
            rights = self._right[joined[alive]]
            np.minimum.at(scratch, rights, ranks[alive])
            touched.append(rights)
            ends, part = self.rank[part], self.right[part]
        crossed = (scratch[self._spine[ids]] <= self._ends[ids]).any(1)
        for rights in touched:
            scratch[rights] = NEVER
        return ~crossed

    def spell(self, word: bytes, *, ended: bool = True) -> tuple[int, ...]:
        """The ids of a word; `ended` says that the word is whole, so that one which is a token stays that token."""
        if ended and (token := self.whole.get(word)) is not None:
            return (token,)
        ids = self._symbols(word)
        return tuple(self._merged(ids) if len(ids) <= _LONG else self._merged_by_heap(ids))

    def _merged(self, ids: list[int]) -> list[int]:
        """Symbols after all merges, the best one first, of several the leftmost; quick for short words."""
        ranks = [self._across(*pair) for pair in pairwise(ids)]
        while ranks and (best := min(ranks)) != NEVER:
            at = ranks.index(best)
            ids[at : at + 2] = [self._pairs[ids[at] * self.size + ids[at + 1]]]
            del ranks[at]
            if at:
                ranks[at - 1] = self._across(ids[at - 1], ids[at])
            if at < len(ranks):
                ranks[at] = self._across(ids[at], ids[at + 1])
        return ids

    def _merged_by_heap(self, ids: list[int]) -> list[int]:
        """The same in a time that grows little faster than the word: a heap of merges, over symbols that know their neighbours."""
        size = len(ids)
        ranks = [*(self._across(*pair) for pair in pairwise(ids)), NEVER]
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))
        heap = [rank * size + at for at, rank in enumerate(ranks) if rank != NEVER]
        heapify(heap)
        while heap:
            rank, at = divmod(heappop(heap), size)
            if ranks[at] != rank:  # one of the two was merged away
                continue
            gone = after[at]
            ids[at] = self._pairs[ids[at] * self.size + ids[gone]]
            ids[gone], ranks[gone] = ATOM, NEVER
            then = after[at] = after[gone]
            if then < size:
                before[then] = at
            for left, right in ((before[at], at), (at, then)):
                if left >= 0:
                    rank = ranks[left] = self._across(ids[left], ids[right]) if right < size else NEVER
                    if rank != NEVER:
                        heappush(heap, rank * size + left)
        return [token for token in ids if token != ATOM]

    def _across(self, left: int, right: int) -> int:
        """The rank of the merge of two ids."""
        joined = self._pairs.get(left * self.size + right)
        return NEVER if joined is None else self.rank[joined]

    def _symbols(self, word: bytes) -> list[int]:
        """Single symbols: characters that are atoms, else bytes; bytes without a token are left out, as the tokenizers do."""
        atoms, ids, at = self.atoms, [], 0
        while at < len(word):
            for width in (1,) if word[at] < 0x80 else (4, 3, 2, 1):
                symbol = atoms.get(word[at : at + width]) if at + width <= len(word) else None
                if symbol is not None:
                    ids.append(symbol)
                    at += width
                    break
            else:
                at += 1
        return ids
