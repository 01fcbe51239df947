"""The sums that a bridge makes of a small model's probabilities, written down, so that another model can be put into them.

S(c) is a ratio of sums of terms ± P(path) or ± P(path) P(one of some tokens | path). Which terms there are is found with the
probabilities of one model, the frozen one of a pair; the tuned one is then weighed by the same terms, and gradients run through them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.vocabulary.bridge import Bridge, Path, Place, Rows
from uld_adapters.vocabulary.outcome import CROWD
from uld_adapters.vocabulary.tally import LEAST, Tally
from uld_adapters.vocabulary.weigher import Weigher


@dataclass(frozen=True)
class Term:
    """`sign` times the mass of a path, or with `ids` of the path and one of these tokens after it."""

    sign: int
    path: Path
    ids: Int[np.ndarray, " n"] | None = None

    def mass(self, rows: Rows) -> Float[np.ndarray, " models"]:
        """Its value under the models of the rows."""
        found = np.full(next(iter(rows.values())).shape[0], float(self.sign))
        for size, token in enumerate(self.path):
            found = found * rows[self.path[:size]][:, token]
        return found if self.ids is None else found * rows[self.path].take(self.ids, 1).sum(1, dtype=np.float64)


@dataclass(frozen=True)
class Terms:
    """At one place: the mass that a token of the remote begins there, and that it is each of the candidates; None: no counterpart.

    `standing` are the paths at which the small model may stand there, with their weight under the first model.
    """

    boundary: tuple[Term, ...]
    candidates: tuple[tuple[Term, ...] | None, ...]
    standing: tuple[tuple[Path, float], ...]


@dataclass
class _Written(Tally):
    """A tally that keeps what it counts."""

    terms: list[Term] = field(default_factory=list)


class _Writer(Weigher):
    """Weighs, and writes the terms of `yes` and `now` down."""

    def others(
        self, path: Path, heavy: Sequence[int], without: Int[np.ndarray, " n"] | None, mass: Float[np.ndarray, " models"], tally: Tally
    ) -> None:
        super().others(path, heavy, without, mass, tally)
        _terms(tally).append(Term(1, path))
        apart = np.array([*heavy, *([] if without is None else without.tolist())], dtype=np.int64)
        if apart.size:
            _terms(tally).append(Term(-1, path, apart))

    def light(self, path: Path, ids: Int[np.ndarray, " n"], heavy: Sequence[int], tally: Tally) -> None:
        light = ids[~np.isin(ids, heavy)]
        if 0 < light.size <= CROWD:  # more would take more room than all the rest
            _terms(tally).append(Term(1, path, light))

    def settle(self, path: Path, weight: Float[np.ndarray, " models"], tally: Tally, *, now: bool, certain: bool, hit: float) -> None:
        super().settle(path, weight, tally, now=now, certain=certain, hit=hit)
        if now:
            _terms(tally).append(Term(1, path))


def _terms(tally: Tally) -> list[Term]:
    if not isinstance(tally, _Written):
        raise TypeError("a writer needs tallies that keep their terms")
    return tally.terms


def write_terms(bridge: Bridge, place: Place, candidates: Sequence[int], rows: Rows) -> Terms:
    """The terms of s(c) for the candidates; `rows` are those of `Bridge.cover` and `Bridge.nodes`."""
    weigher = bridge.weigher(place, rows, LEAST, kind=_Writer)
    boundary = _Written.empty(weigher.models)
    standing = bridge.boundary(weigher, place, boundary)
    found: list[tuple[Term, ...] | None] = []
    for token in candidates:
        if bridge.neutral(token):
            found.append(None)
            continue
        tally = _Written.empty(weigher.models)
        bridge.candidate(weigher, place, token, tally)
        found.append(tuple(tally.terms) or None)
    return Terms(tuple(boundary.terms), tuple(found), tuple((path, float(weight[0])) for path, weight in standing))
