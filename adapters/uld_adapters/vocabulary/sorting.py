"""Which of many tokens of the small model decide an event, found by the bytes that they share instead of one by one."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.outcome import Event, Outcomes

_KEPT = 20_000
_GROUPS = 500  # of a large vocabulary, up to a megabyte each
_LOOKS = 64  # beginnings of tokens that are looked at, those of most tokens first


@dataclass(frozen=True, eq=False)
class Sorted:
    """The tokens `ids`, in the order of their bytes, by what an event is after each.

    After those of `yes` it holds whatever follows; else it may be open: it holds if the text ends there (`now`), or does not (`may`).
    `hit` are the shares of the small vocabulary that could change it next, after those of `now` and then of `may`. Nobody looked at
    those of `rest`. Of `yes` and `rest`, which may be many, the places in `ids` are kept, as (from, to).
    """

    ids: Int[np.ndarray, " n"]
    yes_at: Sequence[tuple[int, int]]
    now: Int[np.ndarray, " now"]
    may: Int[np.ndarray, " may"]
    hit: Float[np.ndarray, " open"]
    rest_at: Sequence[tuple[int, int]]

    @property
    def yes(self) -> Int[np.ndarray, " yes"]:
        """Tokens after which the event holds whatever follows."""
        return np.concatenate([self.ids[:0], *(self.ids[low:high] for low, high in self.yes_at)])

    @property
    def rest(self) -> Int[np.ndarray, " rest"]:
        """Tokens that nobody looked at."""
        return np.concatenate([self.ids[:0], *(self.ids[low:high] for low, high in self.rest_at)])

    def uniform(self, rows: int) -> Float[np.ndarray, "3"]:
        """The share of a vocabulary that counts to yes, now and may, where what follows open tokens is uniform, too."""
        now, may = (hit.sum() for hit in np.split(self.hit, [self.now.size]))
        yes, rest = (sum(high - low for low, high in spans) for spans in (self.yes_at, self.rest_at))
        return np.array([yes + self.now.size - now, now, may + rest]) / rows


class Sorter:
    """Sorts tokens by an event, and remembers how."""

    def __init__(self, outcomes: Outcomes, tokens: Sequence[bytes], rows: int) -> None:
        self.outcomes, self.tokens, self.rows = outcomes, tokens, rows
        self._known: dict[tuple[Event, bytes, int, int], Sorted] = {}
        self._ordered: dict[int, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]] = {}

    def sort(self, event: Event, more: bytes, skip: int, ids: Int[np.ndarray, " n"]) -> Sorted:
        """How tokens, in the order of their bytes, go on with a text that ends with `more`, which has their first `skip` bytes already."""
        event = event.free(self.outcomes, more)
        of = (event, more, skip, id(ids))
        known = self._known.get(of)
        if known is None or known.ids is not ids:
            if len(self._known) >= _KEPT:
                self._known.clear()
            known = self._known[of] = self._sort(event, more, skip, ids)
        return known

    def by_bytes(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """A group's ids in the order of their bytes, the same array each time: thousands of sorted ones refer to a few of them."""
        known = self._ordered.get(id(ids))
        if known is None or known[0] is not ids:
            if len(self._ordered) >= _GROUPS:
                self._ordered.clear()
                self._known.clear()  # refers to them
            known = self._ordered[id(ids)] = ids, ids[np.argsort(self.outcomes.small.rank[ids])]
        return known[1]

    def after(self, event: Event, more: bytes) -> Float[np.ndarray, "3"]:
        """The share of texts under the uniform model that counts to yes, now and may, of an event that is open at the end of `more`."""
        hit = self.by_bytes(self.outcomes.hitters(event, more).ids)
        found = self.sort(event, more, 0, hit).uniform(self.rows)
        found[0] += self.outcomes.judge(event, more)[0] * (1 - hit.size / self.rows)
        return found

    def _sort(self, event: Event, more: bytes, skip: int, ids: Int[np.ndarray, " n"]) -> Sorted:
        places = range(ids.size)

        def end(at: int) -> bytes:
            return self.tokens[ids[at]][skip:]

        yes: list[tuple[int, int]] = []
        open_: tuple[list[int], list[int]] = ([], [])
        hit: tuple[list[float], list[float]] = ([], [])
        waiting = [(-ids.size, 0, 0)] if ids.size else []
        for _ in range(_LOOKS):
            if not waiting:
                break
            count, low, size = heappop(waiting)
            high = low - count
            begun = end(low) if high - low == 1 else end(low)[:size]
            now, certain = self.outcomes.judge(event, more + begun)
            if certain:
                if now:
                    yes.append((low, high))
                continue
            after = self.outcomes.hitters(event, more + begun)
            while low < high and len(end(low)) == len(begun):
                open_[not now].append(low)
                hit[not now].append(after.ids.size / self.rows)
                low += 1
            while low < high:
                byte = end(low)[size]
                last = high if byte == 255 else bisect_left(places, begun + bytes([byte + 1]), low, high, key=end)
                if after.begins(byte):
                    heappush(waiting, (low - last, low, size + 1))
                elif now:
                    yes.append((low, last))
                low = last
        rest = sorted((low, low - count) for count, low, _ in waiting)
        return Sorted(ids, sorted(yes), ids[open_[0]], ids[open_[1]], np.array([*hit[0], *hit[1]]), rest)
