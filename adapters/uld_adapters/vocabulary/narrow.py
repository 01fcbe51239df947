"""Weighing with narrow bounds: each group of tokens is sorted by what it decides, instead of left open."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.index import Group
from uld_adapters.vocabulary.outcome import Event
from uld_adapters.vocabulary.sorting import Sorter
from uld_adapters.vocabulary.tally import Path, Tally, most
from uld_adapters.vocabulary.weigher import Looked, Weigher


class NarrowWeigher(Weigher):
    """A weigher that leaves no token open which the bytes decide, however light it is; open ones lighter than `least` are no leaves.

    What follows an open token under the uniform model is known without a row.
    """

    def __init__(self, sorter: Sorter, small: Covers, rows: Mapping[Path, Float[np.ndarray, "models rows"]], *, least: float) -> None:
        super().__init__(sorter.outcomes, small, rows, sorter.rows, least=least)
        self.sorter = sorter

    def tokens(self, event: Event, path: Path, ids: Int[np.ndarray, " n"], skip: int, more: bytes, tally: Tally) -> None:
        """All texts that go on after a path with one of the tokens, of whose bytes the first `skip` are in the text already."""
        if path in self.rows:
            self._sorted(event, path, ids, skip, more, tally)
            return
        told = self._told(path)
        weight = self.weight(told)
        tally.may[:-1] += weight[:-1]
        tally.leaves.append((most(weight), path))
        uniform = self.sorter.sort(event, more, skip, ids).uniform(self.size)
        self._free(uniform * weight[-1] * self.size ** (len(told) - len(path)), tally)

    def _singly(
        self, event: Event, path: Path, looked: Looked, more: bytes, skip: int, tally: Tally, *, rest: Float[np.ndarray, " models"]
    ) -> None:
        self._sorted(event, path, self.sorter.by_bytes(looked.ids), skip, more, tally)

    def _sorted(self, event: Event, path: Path, ids: Int[np.ndarray, " n"], skip: int, more: bytes, tally: Tally) -> None:
        """Count all of the tokens after a path whose row is known."""
        row, weight = self.rows[path], self.weight(path)
        found = self.sorter.sort(event, more, skip, ids)
        tally.yes += weight * self._sum(row.take(found.yes, 1))
        read = {below[-1] for below in self.rows if len(below) == len(path) + 1 and below[:-1] == path}
        hits = np.split(found.hit, [found.now.size])
        for open_, hit, held in ((found.now, hits[0], tally.now), (found.may, hits[1], tally.may)):
            chances = row.take(open_, 1) * weight[:-1, None]
            if read:
                further = np.isin(open_, list(read))
                for token in open_[further].tolist():
                    self.node(event, (*path, token), more + self.small.tokens[token][skip:], tally)
                open_, hit, chances = open_[~further], hit[~further], chances[:, ~further]
            held[:-1] += chances.sum(1, dtype=np.float64)
            held[-1] += weight[-1] * hit.sum() / self.size
            if held is tally.now:
                tally.yes[-1] += weight[-1] * (hit.size - hit.sum()) / self.size
            largest = chances.max(0)
            tally.leaves += [(float(largest[at]), (*path, int(open_[at]))) for at in np.flatnonzero(largest >= self.least).tolist()]
        super()._singly(event, path, self.looked(path, Group(found.rest), self.least_after(path)), more, skip, tally, rest=tally.may)

    def _free(self, mass: Float[np.ndarray, "3"], tally: Tally) -> None:
        """Count mass of yes, now and may under the uniform model, of which no rows need be known."""
        for held, more in zip((tally.yes, tally.now, tally.may), mass.tolist(), strict=True):
            held[-1] += more

    def leaf(self, event: Event, path: Path, more: bytes, weight: Float[np.ndarray, " models"], tally: Tally) -> None:
        """All texts that begin with a path."""
        now, certain = self.outcomes.judge(event, more)
        if certain or path in self.rows:
            super().leaf(event, path, more, weight, tally)
            return
        (tally.now if now else tally.may)[:-1] += weight[:-1]
        self._free(self.sorter.after(event, more) * weight[-1], tally)
        tally.leaves.append((most(weight), path))
