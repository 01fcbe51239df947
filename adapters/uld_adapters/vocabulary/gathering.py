"""The masses of many candidates at a place, gathered from the rows at once; what is heavy beside their own spellings is looked at."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.plan import ASTRAY, MAY, NOW, Block, Own, Part, Path, Plan, Planned
from uld_adapters.vocabulary.tally import Tallies, any_of
from uld_adapters.vocabulary.weigher import Weigher


class Found(NamedTuple):
    """A block of one of many plans, at a path below the base."""

    at: int
    plan: Plan
    base: Path
    path: Path
    block: Block


class Gathering:
    """Counts all parts of many plans at once, and then by themselves the few tokens that are looked at."""

    def __init__(self, weigher: Weigher, asked: Sequence[Planned]) -> None:
        self.weigher, self.asked, self.count = weigher, asked, len(asked)
        self.tallies = Tallies(np.zeros((3, self.count, weigher.models)))

    def tell(self) -> Tallies:
        """The masses of each plan."""
        found: list[Found] = []
        masses, heavy = [], []
        for path, group in self._groups().items():
            weight = self.weigher.weight(path)
            chances = self.weigher.rows[path].take(np.concatenate([each.block.ids for each in group]), 1)
            mass = np.empty((weight.size, chances.shape[1]))
            np.multiply(chances, weight[:-1, None], out=mass[:-1])
            mass[-1] = weight[-1] / self.weigher.size
            found += group
            masses.append(mass)
            heavy.append(any_of(chances >= self.weigher.least_after(path)))
        if found:
            self._count(found, np.concatenate(masses, 1), np.concatenate(heavy).nonzero()[0])
            np.maximum(self.tallies.mass, 0.0, out=self.tallies.mass)  # what is taken from a sum may exceed it by rounding
        return self.tallies

    def _groups(self) -> dict[Path, list[Found]]:
        """The blocks of all plans by the paths at which they are."""
        found: dict[Path, list[Found]] = defaultdict(list)
        for at, (plan, bases) in enumerate(self.asked):
            for block in plan.blocks:
                for base in bases:
                    path = base + block.path
                    found[path].append(Found(at, plan, base, path, block))
        return found

    def _count(self, found: Sequence[Found], every: Float[np.ndarray, "models tokens"], heavy: Int[np.ndarray, " some"]) -> None:
        """Count blocks whose tokens have these masses, some of them heavy."""
        sizes, to, looked = np.concatenate([each.block.told for each in found]).T
        counts = [len(each.block.parts) for each in found]
        of, firsts = np.arange(len(found)).repeat(counts), [*accumulate(counts, initial=0)]
        places = to * self.count + np.array([each.at for each in found])[of]
        ends = np.add.accumulate(sizes)
        sums = np.add.reduceat(every, ends - sizes, 1)
        own: list[tuple[int, Found, Own]] = []
        crowds: list[Found] = []
        read: list[int] = []  # columns of ways astray that have been read
        for each, (first, last) in zip(found, pairwise(firsts), strict=True):
            block = each.block
            if block.own:
                own.append((first, each, block.own))
            if block.crowd:
                crowds.append(each)
            if block.ways:
                begin = int(ends[last - 1]) - len(block.ways)
                read += [begin + at for at, way in enumerate(block.ways) if each.base + way in self.weigher.rows]

        columns = np.array(sorted({*heavy.tolist(), *read}), dtype=np.int64) if read else heavy
        parts = ends.searchsorted(columns, "right")
        here = looked[parts].nonzero()[0]
        columns, parts = columns[here], parts[here]
        for column, part, number in zip(columns.tolist(), parts.tolist(), of[parts].tolist(), strict=True):
            told = found[number].block.parts[part - firsts[number]]
            self._closer(found[number], told, int(told.ids[column - ends[part]]))

        # Taken from the sums: what has been looked at, and of own spellings what cannot come to another end; if they hold, it is certain.
        leading = np.array([first for first, *_ in own], dtype=np.int64)
        closed = sums.take(leading, 1)
        closed *= np.maximum(1.0 - self._left_open(own, np.maximum.reduce(closed[:-1], 0).tolist()), 0.0)
        held = (to[leading] == NOW).nonzero()[0]
        at = np.array([each.at for each in crowds], dtype=np.int64)
        places = np.concatenate([places, places[parts], places[leading], places[leading[held]] - self.count, at + MAY * self.count])
        masses = np.concatenate([sums, -every.take(columns, 1), -closed, closed.take(held, 1), self._crowded(crowds)], 1)
        flat = self.tallies.mass.reshape(-1, self.weigher.models)
        for number, mass in enumerate(masses):
            flat[:, number] += np.bincount(places, mass, len(flat))

    def _left_open(self, own: Sequence[tuple[int, Found, Own]], weights: Sequence[float]) -> Float[np.ndarray, "models own"]:
        """Which share of the mass of candidates' own spellings stays open; what is heavy after those that have been read is counted."""
        weigher, leaves = self.weigher, self.tallies.leaves
        open_ = np.ones((weigher.models, len(own)))
        open_[-1] = [spelled.open for *_, spelled in own]
        for number, ((_, each, spelled), weight) in enumerate(zip(own, weights, strict=True)):
            path = (*each.path, spelled.token)
            if path not in weigher.rows:
                leaves.append((weight, path))
                continue
            looked = weigher.looked(path, weigher.outcomes.small.starting(spelled.hits), weigher.least_of(weight))
            open_[:, number] = looked.mass
            if looked.heavy:
                tally = self.tallies.of(each.at)
                rest = tally.now if each.block.parts[0].to == NOW else tally.may
                rest -= weigher.apart(each.plan.event, path, looked.heavy, each.plan.data, 0, tally)
        return open_

    def _crowded(self, crowds: Sequence[Found]) -> Float[np.ndarray, "models crowds"]:
        """The masses of tokens at which nobody looks one by one, without those that are known to end as asked: these are counted."""
        masses = np.empty((self.weigher.models, len(crowds)))
        for number, each in enumerate(crowds):
            masses[:, number] = self.weigher.weight(each.path)
            masses[-1, number] *= each.block.crowd / self.weigher.size
            if each.block.ending.size:
                now = self.weigher.mass(each.path, each.block.ending)
                self.tallies.mass[NOW, each.at] += now
                masses[:, number] -= now
        return masses

    def _closer(self, found: Found, part: Part, token: int) -> None:
        """Count a token that is heavy."""
        at, plan, base, path, block = found
        weigher, tally = self.weigher, self.tallies.of(at)
        if part.skip == ASTRAY:
            for overhang in plan.astray[*block.path, token]:
                plan.beyond(weigher, base, overhang, tally)
        else:
            below = (*path, token)
            weigher.leaf(plan.event, below, plan.data + weigher.small.tokens[token][part.skip :], weigher.weight(below), tally)
