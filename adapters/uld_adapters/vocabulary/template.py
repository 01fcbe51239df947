"""Candidates whose spelling does not touch what stands before them: looked up once, and weighed all at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.outcome import Outcomes
from uld_adapters.vocabulary.tally import CROWD, Event, Tally, Weigher

Path = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """One of the remote's tokens after a place at which tokens of both sides end for certain.

    `exact` is the small model's token that spells it, `beyond` are those that begin with it (None: a crowd of `many`), `astray`
    the first ones of other spellings. `hit` is the share of the small vocabulary after which the outcome may be another.
    """

    exact: int
    now: bool
    certain: bool
    hit: float
    beyond: Int[np.ndarray, " n"] | None
    many: int
    astray: Int[np.ndarray, " n"]


class Templates:
    """Templates of the remote's tokens; a token that the small model spells in several pieces has none."""

    def __init__(self, outcomes: Outcomes, small: Covers, size: int) -> None:
        self.outcomes, self.small, self.size = outcomes, small, size
        self._made: dict[int, Template | None] = {}

    def of(self, token: int) -> Template | None:
        """The template of a token, made when first asked for."""
        if token not in self._made:
            self._made[token] = self._make(token)
        return self._made[token]

    def _make(self, token: int) -> Template | None:
        data = self.outcomes.remote.tokens[token]
        if not data or self.small.written(data) != data:
            return None
        exact, overhangs = self.small.onward(b"", data)
        if len(exact) > 1 or len(exact[0]) > 1:
            return None
        now, certain = Event(b"", b"", token).judge(self.outcomes, data)
        beyond = [overhang.ids for overhang in overhangs if not overhang.path]
        many = sum(map(len, beyond))
        astray = np.array(sorted({overhang.path[0] for overhang in overhangs if overhang.path}), dtype=np.int64)
        hit = self.outcomes.hitters(b"", data).size / self.size
        few = np.concatenate(beyond) if beyond else np.empty(0, dtype=np.int64)
        return Template(exact[0][0], now, certain, hit, None if many > CROWD else few, many, astray)

    def weigh(self, weigher: Weigher, path: Path, found: Sequence[Template]) -> list[Tally | None]:
        """The tallies of candidates at a path; None where spellings beside the candidate's own are heavy, and need a closer look."""
        row, weight = weigher.rows[path], weigher.weight(path)
        count = len(found)
        exact = row[:, [template.exact for template in found]]
        parts = [np.concatenate([t.astray, t.astray[:0] if t.beyond is None else t.beyond]) for t in found]
        owner = np.repeat(np.arange(count), [len(part) for part in parts])
        chances = row[:, np.concatenate(parts)] if parts else row[:, :0]
        heavy = np.zeros(count, dtype=bool)
        heavy[owner[(chances * weight[:-1, None]).max(0) >= weigher.least]] = True
        beside = np.stack([np.bincount(owner, weights=chance, minlength=count) for chance in chances]) if count else np.empty((len(row), 0))
        tallies: list[Tally | None] = []
        for at, template in enumerate(found):
            if heavy[at]:
                tallies.append(None)
                continue
            tally = Tally(weigher.models)
            tally.may[:-1] = weight[:-1] * (beside[:, at] if template.beyond is not None else 1.0)
            tally.may[-1] = weight[-1] * (template.many + len(template.astray)) / self.size
            mass = weight * np.append(exact[:, at], 1 / self.size)
            weigher.settle((*path, template.exact), mass, tally, now=template.now, certain=template.certain, hit=template.hit)
            tallies.append(tally)
        return tallies
