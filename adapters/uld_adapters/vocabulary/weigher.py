"""Sums mass over the leaves of a tree of the small model's tokens."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.cover import Covers, Overhang
from uld_adapters.vocabulary.index import Group
from uld_adapters.vocabulary.memory import Memory
from uld_adapters.vocabulary.outcome import CROWD, Event, Outcomes
from uld_adapters.vocabulary.tally import Path, Tally, any_of, most, places


class Looked(NamedTuple):
    """Tokens after a path, their mass there by model, and the heavy ones of them."""

    ids: Int[np.ndarray, " n"]
    mass: Float[np.ndarray, " models"]
    heavy: Sequence[int]


class _Weights(dict[Path, Float[np.ndarray, " models"]]):
    """Probabilities of paths. It knows no weigher: in a circle of references many large rows would wait for the garbage collector."""

    rows: Mapping[Path, Float[np.ndarray, "models rows"]]

    def __init__(self, models: int, size: int) -> None:
        super().__init__({(): np.ones(models)})
        self._models, self._size = models, size

    def __missing__(self, path: Path) -> Float[np.ndarray, " models"]:
        before, found = path[:-1], np.empty(self._models)
        found[:-1], found[-1] = self.rows[before][:, path[-1]], 1 / self._size
        found *= self[before]
        self[path] = found
        return found

    def below(self, path: Path, tokens: Sequence[int]) -> Float[np.ndarray, "tokens models"]:
        """Those of a path with each of the tokens after it, all at once."""
        found = np.empty((len(tokens), self._models))
        found[:, :-1], found[:, -1] = self.rows[path].take(tokens, 1).T, 1 / self._size
        found *= self[path]
        return found


class Weigher:
    """Weighs events by the rows of the small models; one more model, the last, is uniform over the small vocabulary.

    Tokens that no model gives `least` of the mass stay open as a group, without a look at each.
    """

    def __init__(
        self, outcomes: Outcomes, small: Covers, rows: Mapping[Path, Float[np.ndarray, "models rows"]], size: int, *, least: float
    ) -> None:
        self.outcomes, self.small, self.size, self.least = outcomes, small, size, least
        self.models = next(iter(rows.values())).shape[0] + 1
        self._weights = weights = _Weights(self.models, size)
        self.weight = weights.__getitem__  # the probability of a path, as a share of what is given
        largest: Memory[Path, float] = Memory(lambda path: most(weights[path]))
        self._most = largest.__getitem__  # under any of the models
        self.know(rows)

    def know(self, rows: Mapping[Path, Float[np.ndarray, "models rows"]]) -> None:
        """Go on with these rows, among which are those so far."""
        self.rows = self._weights.rows = rows

    def given(self, paths: Iterable[Path], overhangs: Iterable[Overhang]) -> None:
        """Take the cover of a prefix for certain, so that from then on all masses are shares of its own."""
        mass = np.zeros(self.models)
        for path in paths:
            mass += self.weight(path)
        for overhang in overhangs:
            if overhang.path in self.rows:
                mass += self.mass(overhang.path, overhang.ids)
        self._weights.clear()
        mass[mass <= 0] = 1.0
        self._weights[()] = 1 / mass

    def heavy(self, path: Path) -> bool:
        """Whether a path may have the mass `least`, as far as the rows tell."""
        return self._most(self._told(path)) >= self.least

    def heaviest(self, paths: Sequence[Path]) -> Sequence[Path]:
        """Those of some paths that may have the share `least` of the heaviest of them under any of the models, as far as the rows tell."""
        if len(paths) < 2:
            return paths
        weights = [self.weight(self._told(path)).tolist()[:-1] for path in paths]
        known = [weight for path, weight in zip(paths, weights, strict=True) if path[:-1] in self.rows]
        floors = [self.least * max(each) for each in zip(*known, strict=True)] or [0.0] * (self.models - 1)
        return [path for path, weight in zip(paths, weights, strict=True) if any(map(operator.ge, weight, floors))]

    def _told(self, path: Path) -> Path:
        """As much of a path as its rows tell the weight of."""
        for size in range(len(path)):
            if path[:size] not in self.rows:
                return path[:size]
        return path

    def node(self, event: Event, path: Path, more: bytes, tally: Tally, *, without: Int[np.ndarray, " n"] | None = None) -> None:
        """All texts after a path whose row is known."""
        looked = self.looked(path, self.outcomes.hitters(event, more), self.least_after(path))
        now = self.outcomes.judge(event, more)[0]
        if now:
            mass = looked.mass if without is None else looked.mass + self._sum(self.rows[path].take(without, 1))
            self.others(path, looked.heavy, without, mass, tally)
        self._singly(event, path, looked, more, 0, tally, rest=tally.now if now else tally.may)

    def least_after(self, path: Path) -> float:
        """The least probability after a path with which a token may have the mass `least`."""
        return self.least_of(self._most(path))

    def least_of(self, weight: float) -> float:
        """The same after a path of this weight."""
        return self.least / weight if 0 < weight >= self.least else np.inf

    def looked(self, path: Path, group: Group, least: float) -> Looked:
        """The mass of tokens after a path, and which of them have at least this probability."""
        row = self.rows[path]
        if group.chosen is None:
            chances = row.take(group.ids, 1)
            mass = self._sum(chances)
            heavy = group.ids[any_of(chances >= least).nonzero()[0]].tolist() if most(mass) >= least else []
        else:
            mass = self._masses(row @ group.chosen, group.ids.size)
            heavy = [token for token in places(any_of(row >= least)) if group.chosen[token]] if most(mass) >= least else []
        return Looked(group.ids, mass, heavy)

    def others(
        self, path: Path, heavy: Sequence[int], without: Int[np.ndarray, " n"] | None, mass: Float[np.ndarray, " models"], tally: Tally
    ) -> None:
        """Count what holds after a path but for some mass of it; of that all but heavy tokens and those left out is counted to `now`."""
        tally.yes += self.weight(path) * np.maximum(1.0 - mass, 0.0)

    def light(self, path: Path, ids: Int[np.ndarray, " n"], heavy: Sequence[int], tally: Tally) -> None:
        """Told of tokens after a path of which all but the heavy ones were counted to `now`."""

    def mass(self, path: Path, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, " models"]:
        """That of these tokens after a path."""
        return self.weight(path) * self._sum(self.rows[path].take(ids, 1))

    def _sum(self, chances: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, " models"]:
        """The mass of tokens by model."""
        # Pairwise: as exact as the rows are, and of singles twice as fast as in doubles.
        return self._masses(np.add.reduce(chances, axis=1), chances.shape[1])

    def _masses(self, sums: Float[np.ndarray, " rows"], count: int) -> Float[np.ndarray, " models"]:
        """The mass of so many tokens under the models that have rows, and under the uniform one."""
        found = np.empty(self.models)
        found[:-1], found[-1] = sums, count / self.size
        return found

    def tokens(self, event: Event, path: Path, ids: Int[np.ndarray, " n"], skip: int, more: bytes, tally: Tally) -> None:
        """All texts that go on after a path with one of the tokens, of whose bytes the first `skip` are in the text already."""
        if path not in self.rows:
            weight = self.weight(self._told(path))
            tally.may += weight
            tally.leaves.append((most(weight), path))
            return
        ending, others = self.outcomes.ending(event, more, skip, ids)
        if ids.size > CROWD or self._most(path) < self.least:
            weight = self.weight(path)
            tally.may[:-1] += weight[:-1]
            tally.may[-1] += weight[-1] * ids.size / self.size
            if ending.size:
                now = self.mass(path, ending)
                tally.now += now
                tally.may -= now
                self.light(path, ending, (), tally)
            return
        for some, rest in ((ending, tally.now), (others, tally.may)):
            if some.size:
                looked = self.looked(path, Group(some), self.least_after(path))
                self._singly(event, path, looked, more, skip, tally, rest=rest)
                if some is ending:
                    self.light(path, some, looked.heavy, tally)

    def _singly(
        self, event: Event, path: Path, looked: Looked, more: bytes, skip: int, tally: Tally, *, rest: Float[np.ndarray, " models"]
    ) -> None:
        """Count tokens after a path to `rest`, but look at the heavy ones of them."""
        mass = self.weight(path) * looked.mass
        if looked.heavy:
            mass = np.maximum(mass - self.apart(event, path, looked.heavy, more, skip, tally), 0.0)
        rest += mass

    def apart(self, event: Event, path: Path, heavy: Sequence[int], more: bytes, skip: int, tally: Tally) -> Float[np.ndarray, " models"]:
        """Look at each of the heavy tokens after a path; the mass of them all."""
        each = self._weights.below(path, heavy)
        for token, weight in zip(heavy, each, strict=True):
            self.leaf(event, (*path, token), more + self.small.tokens[token][skip:], weight, tally)
        return np.add.reduce(each, 0)

    def leaf(self, event: Event, path: Path, more: bytes, weight: Float[np.ndarray, " models"], tally: Tally) -> None:
        """All texts that begin with a path."""
        now, certain = self.outcomes.judge(event, more)
        if not certain and path in self.rows:
            self.node(event, path, more, tally)
            return
        hit = 0.0 if certain or not now else self.outcomes.hit(event, more)
        self.settle(path, weight, tally, now=now, certain=certain, hit=hit)

    def settle(self, path: Path, weight: Float[np.ndarray, " models"], tally: Tally, *, now: bool, certain: bool, hit: float) -> None:
        """Count the mass of a path that nobody looks beyond; what follows it under the uniform model is known all the same."""
        if certain:
            if now:
                tally.yes += weight
            return
        if now:
            tally.now += weight
            tally.yes[-1] += weight[-1] * (1 - hit)
            tally.now[-1] -= weight[-1] * (1 - hit)
        else:
            tally.may += weight
        tally.leaves.append((most(weight), path))
