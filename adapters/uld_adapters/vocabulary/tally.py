"""Mass of texts for which something holds in the remote's tokens, summed over the leaves of a tree of the small model's tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.outcome import NONE, Outcomes

Path = tuple[int, ...]
SINGLY = 32  # tokens of one node that are looked at one by one; the rest of a larger group stays open as a whole


@dataclass(frozen=True)
class Event:
    """That the token `token` of the remote begins where `tail` ends, or (None) that any does.

    The small model's text is the remote's without the bytes `pending` at its start.
    """

    tail: bytes
    pending: bytes
    token: int | None

    def judge(self, outcomes: Outcomes, more: bytes) -> tuple[bool, bool]:
        """Whether it holds for a text that ends with `more`, and whether that is so whatever follows."""
        outcome = outcomes.of(self.tail, self.pending + more)
        if self.token is None:
            bounded = outcome.bounded
            return outcome.now != NONE, bounded is not None
        return outcome.now == self.token, outcome.certain or not outcome.may_be(self.token)


@dataclass
class Tally:
    """Mass by model: `yes` for certain, `now` if texts end where the tree does, `may` for what may yet turn out so.

    `leaves` are the open leaves with their weight, and `held` the share of the first leaf that was kept.
    """

    models: int
    yes: Float[np.ndarray, " models"] = field(init=False)
    now: Float[np.ndarray, " models"] = field(init=False)
    may: Float[np.ndarray, " models"] = field(init=False)
    held: Float[np.ndarray, " models"] = field(init=False)
    leaves: list[tuple[float, Path]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.yes, self.now, self.may = (np.zeros(self.models) for _ in range(3))
        self.held = np.full(self.models, math.nan)


class Weigher:
    """Weighs events by the rows of the small models; one more model, the last, is uniform over the small vocabulary."""

    def __init__(self, outcomes: Outcomes, small: Covers, rows: Mapping[Path, Float[np.ndarray, "models rows"]], size: int) -> None:
        self.outcomes, self.small, self.rows, self.size = outcomes, small, rows, size
        self.models = next(iter(rows.values())).shape[0] + 1
        self._weights: dict[Path, Float[np.ndarray, " models"]] = {(): np.ones(self.models)}

    def chance(self, path: Path, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, "models n"]:
        """The probability of each token after a path."""
        found = np.empty((self.models, len(ids)))
        np.exp(self.rows[path][:, ids], out=found[:-1])
        found[-1] = 1 / self.size
        return found

    def weight(self, path: Path) -> Float[np.ndarray, " models"]:
        """The probability of a path."""
        found = self._weights.get(path)
        if found is None:
            found = self._weights[path] = self.weight(path[:-1]) * self.chance(path[:-1], np.array(path[-1:]))[:, 0]
        return found

    def node(self, event: Event, path: Path, more: bytes, tally: Tally, *, without: Int[np.ndarray, " n"] | None = None) -> None:
        """All texts after a path whose row is known."""
        weight = self.weight(path)
        hit = self.outcomes.hitters(event.tail, event.pending + more)
        chances = self.chance(path, hit)
        now = event.judge(self.outcomes, more)[0]
        if now:
            rest = 1.0 - chances.sum(1)
            if without is not None and without.size:
                rest -= self.chance(path, without).sum(1)
            tally.yes += weight * np.maximum(rest, 0.0)
        self._singly(event, path, hit, chances, more, 0, tally, rest=tally.now if now and event.token is None else tally.may)

    def tokens(self, event: Event, path: Path, ids: Int[np.ndarray, " n"], skip: int, more: bytes, tally: Tally) -> None:
        """All texts that go on after a path with one of the tokens, of whose bytes the first `skip` are in the text already."""
        self._singly(event, path, ids, self.chance(path, ids), more, skip, tally, rest=tally.may)

    def _singly(
        self,
        event: Event,
        path: Path,
        ids: Int[np.ndarray, " n"],
        chances: Float[np.ndarray, "models n"],
        more: bytes,
        skip: int,
        tally: Tally,
        *,
        rest: Float[np.ndarray, " models"],
    ) -> None:
        weight = self.weight(path)
        if len(ids) > SINGLY:
            heaviest = np.argpartition(-chances[:-1].max(0), SINGLY)
            rest += weight * chances[:, heaviest[SINGLY:]].sum(1)
            ids, chances = ids[heaviest[:SINGLY]], chances[:, heaviest[:SINGLY]]
        for token, column in zip(ids.tolist(), chances.T, strict=True):
            self.leaf(event, (*path, token), more + self.small.tokens[token][skip:], weight * column, tally)

    def leaf(self, event: Event, path: Path, more: bytes, weight: Float[np.ndarray, " models"], tally: Tally) -> None:
        """All texts that begin with a path."""
        now, certain = event.judge(self.outcomes, more)
        if certain:
            if now:
                tally.yes += weight
            return
        if path in self.rows:
            self.node(event, path, more, tally)
            return
        heavy = float(weight[:-1].max())
        if now:
            # What follows a text under the uniform model is known without asking.
            weight = weight.copy()
            hit = self.outcomes.hitters(event.tail, event.pending + more).size
            tally.yes[-1] += weight[-1] * (1 - hit / self.size)
            weight[-1] *= hit / self.size
            tally.now += weight
        else:
            tally.may += weight
        tally.leaves.append((heavy, path))
