"""Tokens in the order of their bytes, so that all which begin alike lie side by side."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.memory import Memory

_MANY = 64  # one id in so many
_LARGE = 6  # one id in so many: from there on a row is summed faster as a whole, times 0 or 1
_GROUPS = 2000  # of a large vocabulary, up to two megabytes each, a tenth of that on average
ANY = -1  # all bytes


@dataclass(frozen=True, eq=False)
class Group:
    """Some tokens of a vocabulary, the ids ascending; of large groups also which tokens are in it, as 1 or 0.

    `firsts` are the bytes with which they begin: bit n stands for the byte n.
    """

    ids: Int[np.ndarray, " n"]
    firsts: int = ANY
    chosen: Float[np.ndarray, " rows"] | None = None

    @classmethod
    def of(cls, ids: Int[np.ndarray, " n"], rows: int, firsts: int) -> "Group":
        """These ids of so many."""
        if _LARGE * ids.size <= rows:
            return cls(ids, firsts)
        chosen = np.zeros(rows, dtype=np.float32)
        chosen[ids] = 1
        return cls(ids, firsts, chosen)

    def begins(self, byte: int) -> bool:
        """Whether tokens that begin with a byte are among them."""
        return bool(self.firsts >> byte & 1)


class TokenIndex:
    """Finds ids by how their bytes begin; `ids` are all of them in the order of their bytes, `rank` is where in it each stands.

    Groups that rows are summed over have ascending ids: over many that is ten times as fast as in another order, for a row is then read
    from its start to its end.
    """

    def __init__(self, tokens: Sequence[bytes], ids: Iterable[int]) -> None:
        order = sorted((i for i in ids if tokens[i]), key=lambda i: tokens[i])
        self.keys = [tokens[i] for i in order]
        self.ids = np.array(order, dtype=np.int64)
        self.exact = {tokens[i]: i for i in reversed(order)}
        self.longest = max(map(len, self.keys), default=0)
        firsts = np.fromiter((key[0] for key in self.keys), dtype=np.uint8, count=len(self.keys))
        self._edges = np.searchsorted(firsts, np.arange(257))
        self._rows = len(tokens)
        self.rank = np.zeros(self._rows, dtype=np.int64)
        self.rank[self.ids] = np.arange(self.ids.size)
        self._starting = Memory(self._group, kept=_GROUPS)

    def span(self, prefix: bytes) -> tuple[int, int]:
        """Where in `ids` the tokens stand that begin with the prefix."""
        low = bisect_left(self.keys, prefix)
        stem = prefix.rstrip(b"\xff")
        if not stem:
            return low, len(self.keys)
        return low, bisect_left(self.keys, stem[:-1] + bytes([stem[-1] + 1]), lo=low)

    def beyond(self, prefix: bytes) -> Int[np.ndarray, " n"]:
        """Ids whose bytes begin with the prefix and are longer, in the order of their bytes."""
        low, high = self.span(prefix)
        while low < high and len(self.keys[low]) == len(prefix):
            low += 1
        return self.ids[low:high]

    def _ascending(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """These ids in their own order; of many it is faster to mark them than to sort them."""
        if _MANY * ids.size < self._rows:
            return np.sort(ids)
        here = np.zeros(self._rows, dtype=bool)
        here[ids] = True
        return np.flatnonzero(here)

    def starting(self, firsts: int) -> Group:
        """The tokens whose first byte is one of these: bit n stands for the byte n."""
        return self._starting[firsts]

    def _group(self, firsts: int) -> Group:
        spans = [self.ids[self._edges[first] : self._edges[first + 1]] for first in range(256) if firsts >> first & 1]
        return Group.of(self._ascending(np.concatenate([self.ids[:0], *spans])), self._rows, firsts)

    def touching(self, data: bytes) -> list[tuple[int, int]]:
        """Spans of the tokens that begin with the bytes, or that the bytes begin with."""
        spans = [self.span(data)]
        for size in range(1, len(data)):
            if data[:size] in self.exact:
                low = bisect_left(self.keys, data[:size])
                spans.append((low, low + 1))
        return [span for span in spans if span[0] < span[1]]
