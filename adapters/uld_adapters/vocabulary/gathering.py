"""The masses of many candidates at a place, gathered from the rows at once; what is heavy beside their own spellings is looked at."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.plan import ASTRAY, MAY, NOW, YES, Block, Part, Path, Plan, Planned
from uld_adapters.vocabulary.tally import Tallies, any_of
from uld_adapters.vocabulary.weigher import Weigher


class Found(NamedTuple):
    """A block of one of many plans, at a path; `one` is the mass of one token after it under the uniform model."""

    at: int
    plan: Plan
    base: Path
    block: Block
    path: Path
    one: float


class Gathering:
    """Counts all parts of many plans at once, and then by themselves the few tokens that are looked at."""

    def __init__(self, weigher: Weigher, asked: Sequence[Planned]) -> None:
        self.weigher, self.asked, self.count = weigher, asked, len(asked)
        self.tallies = Tallies(np.zeros((3, self.count, weigher.models)))  # of what is looked at; after `tell` of all
        self.mass = np.zeros((weigher.models, 3 * self.count))  # yes, now and may of each
        self.taken: list[tuple[int, float, int]] = []  # of tokens that are looked at the column, the uniform mass, and what it counted to
        self.free: list[tuple[int, float]] = []  # of masses of now what is certain under the uniform model

    def tell(self) -> Tallies:
        """The masses of each plan."""
        found, chances, heavy = [], [], []
        for path, group in self._groups().items():
            row, weight = self.weigher.rows[path], self.weigher.weight(path)
            one = float(weight[-1]) / self.weigher.size
            found += [Found(*each, path, one) for each in group]
            some = row.take(np.concatenate([block.ids for *_, block in group]), 1)
            heavy.append(any_of(some >= self.weigher.least_after(path)))
            chances.append(some * weight[:-1, None])
        if found:
            self._count(found, np.concatenate(chances, 1), np.concatenate(heavy).nonzero()[0])
        self.tallies.mass += np.maximum(self.mass, 0.0).reshape(len(self.mass), 3, self.count).transpose(1, 2, 0)
        return self.tallies

    def _groups(self) -> dict[Path, list[tuple[int, Plan, Path, Block]]]:
        """The blocks of all plans by the paths at which they are."""
        found: dict[Path, list[tuple[int, Plan, Path, Block]]] = defaultdict(list)
        for at, (plan, bases) in enumerate(self.asked):
            for block in plan.blocks:
                for base in bases:
                    found[base + block.path].append((at, plan, base, block))
        return found

    def _count(self, found: Sequence[Found], every: Float[np.ndarray, "models tokens"], heavy: Int[np.ndarray, " some"]) -> None:
        """Count blocks whose tokens have these masses, some of them heavy."""
        count = self.count
        sizes, to, sign, looked = np.concatenate([each.block.told for each in found], 1)
        lengths, ends = [len(each.block.parts) for each in found], np.cumsum(sizes)
        at, one = np.repeat([(each.at, each.one) for each in found], lengths, 0).T
        places = to * count + at.astype(np.int64)
        sums = np.add.reduceat(every, ends - sizes, 1)
        self._add(places, sums * sign, sizes * sign * one)
        largest, firsts = sums.max(0).tolist(), np.cumsum([0, *lengths]).tolist()
        read: list[int] = []  # columns of ways astray that have been read
        for each, (first, last) in zip(found, pairwise(firsts), strict=True):
            if each.block.crowd:
                self.mass[:-1, MAY * count + each.at] += self.weigher.weight(each.path)[:-1]
                self.mass[-1, MAY * count + each.at] += each.one * each.block.crowd
            if each.block.own is not None and not self._left(each, each.block.own, largest[first]):
                self.taken.append((int(ends[first]) - 1, each.one, int(places[first])))
            for back, way in enumerate(reversed(each.block.ways), 1):
                if each.base + way in self.weigher.rows:
                    read.append(int(ends[last - 1]) - back)
        columns = np.array(sorted({*heavy.tolist(), *read}), dtype=np.int64) if read else heavy
        parts = np.searchsorted(ends, columns, "right")
        here = looked[parts].nonzero()[0]
        blocks = np.searchsorted(firsts, parts[here], "right") - 1
        for column, part, number in zip(columns[here].tolist(), parts[here].tolist(), blocks.tolist(), strict=True):
            each = found[number]
            told = each.block.parts[part - firsts[number]]
            self._closer(each, told, int(told.ids[column - ends[part]]))
            self.taken.append((column, each.one, int(places[part])))
        self._take(every)

    def _left(self, found: Found, token: int, largest: float) -> bool:
        """Whether a candidate's own spelling stays an open leaf; else it has been read, and what follows is counted."""
        own = (*found.path, token)
        if own in self.weigher.rows:
            self.weigher.node(found.plan.event, own, found.plan.data, self.tallies.of(found.at))
            return False
        self.tallies.leaves.append((largest, own))
        self.free.append((found.at, found.one * found.block.free))
        return True

    def _closer(self, found: Found, part: Part, token: int) -> None:
        """Count a token that is heavy."""
        at, plan, base, block, path, _ = found
        weigher, tally = self.weigher, self.tallies.of(at)
        if part.skip == ASTRAY:
            for overhang in plan.astray[*block.path, token]:
                plan.beyond(weigher, base, overhang, tally)
        else:
            below = (*path, token)
            weigher.leaf(plan.event, below, plan.data + weigher.small.tokens[token][part.skip :], weigher.weight(below), tally)

    def _take(self, every: Float[np.ndarray, "models tokens"]) -> None:
        """Leave out what has been counted by itself, and count for certain what is under the uniform model."""
        if self.taken:
            columns, ones, places = map(list, zip(*self.taken, strict=True))
            self._add(places, -every[:, columns], [-one for one in ones])
        if self.free:
            at, certain = zip(*self.free, strict=True)
            free = np.bincount(at, certain, self.count)
            self.mass[-1, YES * self.count : NOW * self.count] += free
            self.mass[-1, NOW * self.count : MAY * self.count] -= free

    def _add(self, places: Sequence[int], chances: Float[np.ndarray, "models n"], uniform: Sequence[float]) -> None:
        for held, masses in zip(self.mass, (*chances, uniform), strict=True):
            held += np.bincount(places, masses, held.size)
