"""Candidates whose spelling does not touch what stands before them: looked up once, and weighed all at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.memory import Memory
from uld_adapters.vocabulary.outcome import CROWD, Event, Outcomes
from uld_adapters.vocabulary.tally import Tallies, Weigher, any_of

Path = tuple[int, ...]
_YES, _NOW, _MAY, _NEVER = range(4)


class Templates:
    """How the remote's tokens are weighed after a place at which tokens of both sides end for certain, a row a token.

    `exact` is the small model's token that spells it (a token that takes several pieces has none), and `kind` what its mass counts
    to. `beside` are the first tokens of other spellings and those that begin with it, last the ones that the remote's tokenizer begins
    with it, too, where the text ends there, and of a `crowd` of them no others; `sizes` are how many there are of the former and of the
    last, and `share` what part of the small vocabulary they are, with all of a crowd. `free` is that of the tokens after which an
    outcome that holds for now does so for certain.
    """

    def __init__(self, outcomes: Outcomes, small: Covers, size: int) -> None:
        self.outcomes, self.small, self.size = outcomes, small, size
        count = len(outcomes.remote.tokens)
        self.exact, self.kind, self.crowd = np.zeros(count, dtype=np.int64), np.full(count, _NEVER), np.zeros(count, dtype=bool)
        self.free, self.share, self.sizes = np.zeros(count), np.zeros((count, 2)), np.zeros((count, 2), dtype=np.int64)
        self.has = Memory(self._make)  # whether a token has a template, which is made when first asked for
        self.beside: dict[int, Int[np.ndarray, " n"]] = {}

    def _make(self, token: int) -> bool:
        data = self.outcomes.remote.tokens[token]
        if token in self.outcomes.remote.vocabulary.control or not data or self.small.written(data) != data:
            return False
        exact, overhangs = self.small.onward(b"", data)
        if len(exact) > 1 or len(exact[0]) > 1:
            return False
        beyond = [overhang.ids for overhang in overhangs if not overhang.path]
        astray = np.array(sorted({overhang.path[0] for overhang in overhangs if overhang.path}), dtype=np.int64)
        many = sum(map(len, beyond))
        self.exact[token] = exact[0][0]
        event = Event(b"", b"", token)
        now, certain = self.outcomes.judge(event, data)
        self.kind[token] = (_YES if now else _NEVER) if certain else _NOW if now else _MAY
        self.crowd[token] = many > CROWD
        self.free[token] = 1 - self.outcomes.hitters(event, data).ids.size / self.size if self.kind[token] == _NOW else 0.0
        halves = [self.outcomes.ending(event, data, len(data), ids) for ids in beyond]
        ending = np.concatenate([astray[:0], *(half for half, _ in halves)])
        others = [astray] if many > CROWD else [astray, *(half for _, half in halves)]
        self.beside[token] = np.concatenate([*others, ending])
        self.sizes[token] = self.beside[token].size - ending.size, ending.size
        self.share[token] = (many + astray.size - ending.size) / self.size, ending.size / self.size
        return True

    def weigh(self, weigher: Weigher, path: Path, tokens: Sequence[int]) -> tuple[Tallies, Bool[np.ndarray, " tokens"]]:
        """The tallies of candidates at a path; and beside which of them other spellings are heavy, so that they need a closer look."""
        row, weight, at, count = weigher.rows[path], weigher.weight(path), np.array(tokens), len(tokens)
        sizes = self.sizes[at].ravel()  # of each token's others, then of its ending
        places, some = np.append(0, np.cumsum(sizes)), sizes > 0
        chances = row.take(np.concatenate([*(self.beside[token] for token in tokens), self.exact[at]]), 1) * weight[:-1, None]
        beside, own = np.empty((count, 2, weigher.models)), np.empty((count, weigher.models))
        beside[..., :-1] = (np.add.reduceat(chances, places, 1, np.float64)[:, :-1] * some).T.reshape(count, 2, -1)
        beside[..., -1] = self.share[at] * weight[-1]
        crowd = self.crowd[at]
        beside[crowd, 0, :-1] = weight[:-1] - beside[crowd, 1, :-1]
        largest = np.maximum.reduceat(chances, places, 1)[:, :-1]
        others, ending = (some & any_of(largest >= weigher.least)).reshape(count, 2).T
        heavy = others | (ending & ~crowd)
        own[:, :-1], own[:, -1] = chances[:, -count:].T, weight[-1] / self.size
        kind, mass = self.kind[at], np.zeros((4, count, weigher.models))
        mass[kind, np.arange(count)] = own
        yes, now, may, _ = mass
        free = own[:, -1] * self.free[at]  # what follows under the uniform model is known
        yes[:, -1] += free
        now[:, -1] -= free
        may += beside[:, 0]
        now += beside[:, 1]
        open_ = np.flatnonzero((kind % _NEVER > 0) & ~heavy)
        leaves = zip(own[open_, :-1].max(1).tolist(), self.exact[at[open_]].tolist(), strict=True)
        return Tallies(mass[:_NEVER], [(largest, (*path, token)) for largest, token in leaves]), heavy
