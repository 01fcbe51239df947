"""Candidates whose spelling does not touch what stands before them: looked up once, and weighed all at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.outcome import Outcomes
from uld_adapters.vocabulary.tally import CROWD, Event, Tallies, Weigher

Path = tuple[int, ...]
_UNKNOWN, _NONE = -2, -1


class Templates:
    """How the remote's tokens are weighed after a place at which tokens of both sides end for certain, a row a token.

    `exact` is the small model's token that spells it (a token that takes several pieces has none). `beside` are the tokens that begin
    with it, unless these are a `crowd`, and the first ones of other spellings; `share` is that of all of them in the small vocabulary.
    `hit` is the share of those after which the outcome may be another.
    """

    def __init__(self, outcomes: Outcomes, small: Covers, size: int) -> None:
        self.outcomes, self.small, self.size = outcomes, small, size
        count = len(outcomes.remote.tokens)
        self.exact = np.full(count, _UNKNOWN)
        self.now, self.certain, self.crowd = np.zeros((3, count), dtype=bool)
        self.hit, self.share = np.zeros((2, count))
        self.beside: dict[int, Int[np.ndarray, " n"]] = {}

    def has(self, token: int) -> bool:
        """Whether a token has a template, which is made when first asked for."""
        if self.exact[token] == _UNKNOWN:
            self._make(token)
        return bool(self.exact[token] != _NONE)

    def _make(self, token: int) -> None:
        self.exact[token] = _NONE
        data = self.outcomes.remote.tokens[token]
        if not data or self.small.written(data) != data:
            return
        exact, overhangs = self.small.onward(b"", data)
        if len(exact) > 1 or len(exact[0]) > 1:
            return
        beyond = [overhang.ids for overhang in overhangs if not overhang.path]
        astray = np.array(sorted({overhang.path[0] for overhang in overhangs if overhang.path}), dtype=np.int64)
        many = sum(map(len, beyond))
        self.exact[token] = exact[0][0]
        self.now[token], self.certain[token] = Event(b"", b"", token).judge(self.outcomes, data)
        self.crowd[token] = many > CROWD
        self.hit[token] = self.outcomes.hitters(b"", data).size / self.size
        self.share[token] = (many + len(astray)) / self.size
        self.beside[token] = astray if many > CROWD else np.concatenate([astray, *beyond])

    def weigh(self, weigher: Weigher, path: Path, tokens: Sequence[int]) -> tuple[Tallies, Bool[np.ndarray, " tokens"]]:
        """The tallies of candidates at a path; and beside which of them other spellings are heavy, so that they need a closer look."""
        row, weight, at, count = weigher.rows[path], weigher.weight(path), np.array(tokens), len(tokens)
        parts = [self.beside[token] for token in tokens]
        owner = np.repeat(np.arange(count), [len(part) for part in parts])
        chances = row[:, np.concatenate(parts)] * weight[:-1, None]
        heavy = np.zeros(count, dtype=bool)
        heavy[owner[(chances >= weigher.least).any(0)]] = True
        own = np.empty((count, weigher.models))
        own[:, :-1], own[:, -1] = (row[:, self.exact[at]] * weight[:-1, None]).T, weight[-1] / self.size
        certain, holds = self.certain[at, None], self.now[at, None]
        mass = np.stack([own * (certain & holds), own * (~certain & holds), own * (~certain & ~holds)])
        yes, now, may = mass
        free = now[:, -1] * (1 - self.hit[at])  # what follows under the uniform model is known
        yes[:, -1] += free
        now[:, -1] -= free
        for model, chance in enumerate(chances):
            may[:, model] += np.where(self.crowd[at], weight[model], np.bincount(owner, weights=chance, minlength=count))
        may[:, -1] += weight[-1] * self.share[at]
        most, exact = own[:, :-1].max(1).tolist(), self.exact[at].tolist()
        return Tallies(mass, [(most[i], (*path, exact[i])) for i in np.flatnonzero(~self.certain[at] & ~heavy).tolist()]), heavy
