"""Mass of texts for which something holds in the remote's tokens, by model."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from jaxtyping import Bool, Float

Path = tuple[int, ...]
LEAST = 1e-3  # share of a position below which a spelling is not looked at by itself


@dataclass
class Tally:
    """Mass by model: `yes` for certain, `now` if texts end where the tree does, `may` for what may yet turn out so.

    `leaves` are the open leaves with their weight.
    """

    yes: Float[np.ndarray, " models"]
    now: Float[np.ndarray, " models"]
    may: Float[np.ndarray, " models"]
    leaves: list[tuple[float, Path]] = field(default_factory=list)

    @classmethod
    def empty(cls, models: int) -> Self:
        """Nothing counted yet."""
        return cls(*np.zeros((3, models)))


@dataclass
class Tallies:
    """Tallies of many events side by side: `mass` are yes, now and may of each, shape (3, events, models)."""

    mass: Float[np.ndarray, "3 events models"]
    leaves: list[tuple[float, Path]] = field(default_factory=list)

    def of(self, at: int) -> Tally:
        """The tally of one event, which counts into the whole."""
        yes, now, may = self.mass
        return Tally(yes[at], now[at], may[at], self.leaves)


def most(weight: Float[np.ndarray, " models"]) -> float:
    """The largest of a mass by model, without the uniform one's."""
    found: float = max(weight.tolist()[:-1])
    return found


def places(marked: Bool[np.ndarray, " n"]) -> list[int]:
    """Where something is so, for many places of which few are marked: twice as fast as `nonzero`."""
    found: list[int] = []
    data = marked.tobytes()
    at = data.find(1)
    while at >= 0:
        found.append(at)
        at = data.find(1, at + 1)
    return found


def any_of(found: Bool[np.ndarray, "rows n"]) -> Bool[np.ndarray, " n"]:
    """What is so in any of the rows."""
    return found[0] if len(found) == 1 else np.logical_or.reduce(found, 0)
