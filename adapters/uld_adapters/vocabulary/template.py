"""Candidates whose spelling does not touch what stands before them: looked up once, and weighed all at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.outcome import CROWD, Event, Outcomes
from uld_adapters.vocabulary.tally import Tallies, Weigher, most

Path = tuple[int, ...]
_YES, _NOW, _MAY, _NEVER = range(4)


class Templates:
    """How the remote's tokens are weighed after a place at which tokens of both sides end for certain, a row a token.

    `exact` is the small model's token that spells it (a token that takes several pieces has none), and `kind` what its mass counts
    to. `beside` are the tokens that begin with it, unless these are a `crowd`, and the first ones of other spellings; `share` is that
    of all of them in the small vocabulary, and `free` that of the tokens after which an outcome that holds for now does so for certain.
    `ending` are those of the tokens that begin with it which the remote's tokenizer begins with it, too, where the text ends there.
    """

    def __init__(self, outcomes: Outcomes, small: Covers, size: int) -> None:
        self.outcomes, self.small, self.size = outcomes, small, size
        count = len(outcomes.remote.tokens)
        self.exact, self.kind, self.crowd = np.zeros(count, dtype=np.int64), np.full(count, _NEVER), np.zeros(count, dtype=bool)
        self.share, self.free = np.zeros((2, count))
        self._made: dict[int, bool] = {}
        self.beside: dict[int, Int[np.ndarray, " n"]] = {}
        self.ending: dict[int, Int[np.ndarray, " n"]] = {}

    def has(self, token: int) -> bool:
        """Whether a token has a template, which is made when first asked for."""
        if token not in self._made:
            self._made[token] = self._make(token)
        return self._made[token]

    def _make(self, token: int) -> bool:
        data = self.outcomes.remote.tokens[token]
        if not data or self.small.written(data) != data:
            return False
        exact, overhangs = self.small.onward(b"", data)
        if len(exact) > 1 or len(exact[0]) > 1:
            return False
        beyond = [overhang.ids for overhang in overhangs if not overhang.path]
        astray = np.array(sorted({overhang.path[0] for overhang in overhangs if overhang.path}), dtype=np.int64)
        many = sum(map(len, beyond))
        self.exact[token] = exact[0][0]
        event = Event(b"", b"", token)
        now, certain = event.judge(self.outcomes, data)
        self.kind[token] = (_YES if now else _NEVER) if certain else _NOW if now else _MAY
        self.crowd[token] = many > CROWD
        self.share[token] = (many + len(astray)) / self.size
        self.free[token] = 1 - self.outcomes.hitters(b"", data).ids.size / self.size if self.kind[token] == _NOW else 0.0
        self.beside[token] = astray if many > CROWD else np.concatenate([astray, *beyond])
        self.ending[token] = np.concatenate([astray[:0], *(self.outcomes.ending(event, data, len(data), ids)[0] for ids in beyond)])
        return True

    def weigh(self, weigher: Weigher, path: Path, tokens: Sequence[int]) -> tuple[Tallies, Bool[np.ndarray, " tokens"]]:
        """The tallies of candidates at a path; and beside which of them other spellings are heavy, so that they need a closer look."""
        row, weight, at, count = weigher.rows[path], weigher.weight(path), np.array(tokens), len(tokens)
        parts = [self.beside[token] for token in tokens]
        owner = np.repeat(np.arange(count), [len(part) for part in parts])
        chances = row.take(np.concatenate(parts), 1) * weight[:-1, None]
        heavy = np.zeros(count, dtype=bool)
        heavy[owner[(chances >= weigher.least).any(0)]] = True
        own = np.empty((count, weigher.models))
        own[:, :-1], own[:, -1] = (row.take(self.exact[at], 1) * weight[:-1, None]).T, weight[-1] / self.size
        kind, mass = self.kind[at], np.zeros((4, count, weigher.models))
        mass[kind, np.arange(count)] = own
        yes, now, may, _ = mass
        free = own[:, -1] * self.free[at]  # what follows under the uniform model is known
        yes[:, -1] += free
        now[:, -1] -= free
        for model, chance in enumerate(chances):
            may[:, model] += np.where(self.crowd[at], weight[model], np.bincount(owner, weights=chance, minlength=count))
        may[:, -1] += weight[-1] * self.share[at]
        held = self._held(row, tokens) * weight
        now += held
        may -= held
        leaves = [(most(own[i]), (*path, int(self.exact[tokens[i]]))) for i in np.flatnonzero((kind % _NEVER > 0) & ~heavy).tolist()]
        return Tallies(mass[:_NEVER], leaves), heavy

    def _held(self, row: Float[np.ndarray, "rows n"], tokens: Sequence[int]) -> Float[np.ndarray, "tokens models"]:
        """The mass of the `ending` of each token."""
        found = np.zeros((len(tokens), len(row) + 1))
        sizes = np.array([len(self.ending[token]) for token in tokens])
        some = np.flatnonzero(sizes)
        if some.size:
            ids = np.concatenate([self.ending[tokens[i]] for i in some.tolist()])
            found[some, :-1] = np.add.reduceat(row.take(ids, 1), np.cumsum(sizes[some]) - sizes[some], 1, dtype=np.float64).T
            found[:, -1] = sizes / self.size
        return found
