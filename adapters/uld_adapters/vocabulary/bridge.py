"""The small model's probabilities of the remote's tokens, where the two spell texts in different tokens.

    s(c) = P(the remote's spelling has a token beginning at the end of the prefix, and it is c) / P(it has one beginning there)

over the texts that the small model may write after the prefix. With one vocabulary on both sides it is the ordinary probability
of c. Pure: the small model is a function from paths of its tokens to rows of probabilities.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from uld_adapters.vocabulary.control import matched
from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.memory import Memory
from uld_adapters.vocabulary.narrow import NarrowWeigher
from uld_adapters.vocabulary.outcome import Event, Outcomes
from uld_adapters.vocabulary.shares import Shares
from uld_adapters.vocabulary.sorting import Sorter
from uld_adapters.vocabulary.tally import LEAST, Tallies, Tally, Weigher
from uld_adapters.vocabulary.template import Templates
from uld_adapters.vocabulary.tokens import Vocabulary

Path = tuple[int, ...]
_PLACES = 16
Rows = Mapping[Path, Float[np.ndarray, "models rows"]]


@dataclass(frozen=True)
class Place:
    """The end of a prefix: `tail` is what of it is open in the small model's tokens, `remote_tail` in the remote's.

    `pending` are bytes that the remote puts before every text and the small model does not (a SentencePiece dummy space).
    """

    tail: bytes
    remote_tail: bytes
    pending: bytes = b""


@dataclass(frozen=True)
class _Known:
    """What the rows of a place's cover tell of candidates: the tallies of those that are `done`, by their number, spelled so."""

    rows: list[np.ndarray]
    weigher: Weigher
    done: dict[int, Path]
    tallies: Tallies

    def open(self, rows: Rows) -> list[int]:
        """Which candidates need a closer look, or get one because the row after their own spelling is there."""
        return [at for at in range(self.tallies.mass.shape[1]) if at not in self.done or self.done[at] in rows]


class Bridge:
    """Two vocabularies, and what one's tokens weigh under models of the other.

    A model's place in a text is a path of tokens after those that are certain (`step` returns these as they become so).
    """

    def __init__(self, remote: Vocabulary, small: Vocabulary) -> None:
        self.remote, self.small = Covers(remote), Covers(small)
        self.outcomes = Outcomes(self.remote, self.small)
        self.control = matched(remote.roles, small.roles, remote.tokens, small.tokens)
        self.rows = small.rows
        self.sorter = Sorter(self.outcomes, small.tokens, self.rows)
        self.templates = Templates(self.outcomes, self.small, self.rows)
        self._neutral = np.fromiter(map(self._unmatched, range(remote.rows)), dtype=bool, count=remote.rows)
        self._kept: dict[tuple[Place, tuple[int, ...], float], _Known] = {}
        self._covers: Memory[bytes, tuple[Path, ...]] = Memory(lambda tail: tuple(beginnings(self.ends(Place(tail, b"")))))
        counterparts = set(self.control.values())
        self.void = np.array([i for i in sorted(small.control) if i not in counterparts], dtype=np.int64)

    def start(self) -> Place:
        """The place at the start of a text."""
        ours, theirs = self.small.spelling.start, self.remote.spelling.start
        return Place(ours, theirs, theirs)

    def begin(self, text: bytes) -> tuple[Path, Place]:
        """The place after a text that is known, such as a prompt without a template."""
        place = self.start()
        certain, tail = self.small.advance(place.tail, self.small.written(text))
        return certain, Place(tail, self.remote.advance(place.remote_tail, self.remote.written(text))[1])

    def step(self, place: Place, token: int) -> tuple[Path, Place]:
        """Go on by one of the remote's tokens: the small model's tokens that are certain by now, and the new place."""
        if token in self.remote.vocabulary.control:
            end = (self.control[token],) if token in self.control else ()
            return (*self.small.path(place.tail), *end), Place(b"", b"")
        data = self.remote.tokens[token]
        certain, tail = self.small.advance(place.tail, self._ours(place, data))
        _, remote_tail = self.remote.advance(self._theirs(place), data)
        return certain, Place(tail, remote_tail)

    def _ours(self, place: Place, data: bytes) -> bytes:
        """A token's bytes as the small model's text has them."""
        return self.small.written(data[len(place.pending) :] if place.pending and data.startswith(place.pending) else data)

    def _theirs(self, place: Place) -> bytes:
        return b"" if place.pending else place.remote_tail

    def ends(self, place: Place) -> list[Path]:
        """The paths at which the small model may stand when the prefix ends."""
        return [*self.small.paths(place.tail), *(overhang.path for overhang in self.small.overhangs(place.tail))]

    def cover(self, place: Place) -> Sequence[Path]:
        """These paths, and those that lead there."""
        return self._covers[place.tail]

    def nodes(self, place: Place, candidates: Sequence[int], rows: Rows, *, ahead: Iterable[int] = (), least: float = LEAST) -> set[Path]:
        """The paths below those of `cover` whose rows `read` needs; with `ahead` also those after these candidates.

        `rows` must have the row of every beginning of a path that they have.
        Spellings that go another way than the candidate's own are left out where the rows say that they weigh less than `least`.
        """
        found: set[Path] = set()
        known = self._known(place, candidates, rows, least)
        for at in known.open(rows):
            token = candidates[at]
            if token not in self.remote.vocabulary.control:
                exact, overhangs = self.small.onward(place.tail, self._ours(place, self.remote.tokens[token]))
                for path in exact:
                    if path and path[:-1] not in rows:
                        found.update(path[:size] for size in range(len(path)))
                for astray, _, _ in overhangs:
                    if astray not in rows and known.weigher.heavy(astray):
                        found.update(astray[:size] for size in range(len(astray) + 1))
        for token in ahead:
            if token not in self.remote.vocabulary.control:
                found.update(self.small.onward(place.tail, self._ours(place, self.remote.tokens[token]))[0])
        return {path for path in found if path not in rows}

    def weigher(self, place: Place, rows: Rows, least: float, *, kind: type[Weigher] = Weigher) -> Weigher:
        """What weighs events at a place by the rows of its cover."""
        weigher = (
            NarrowWeigher(self.sorter, self.small, rows, least=least)
            if least < LEAST
            else kind(self.outcomes, self.small, rows, self.rows, least=least)
        )
        weigher.given(self.small.paths(place.tail), self.small.overhangs(place.tail))
        return weigher

    def _known(self, place: Place, candidates: Sequence[int], rows: Rows, least: float) -> _Known:
        """What the rows of the cover tell; kept for a few places until they are read."""
        cover, of = [rows[path] for path in self.cover(place)], (place, tuple(candidates), least)
        kept = self._kept.get(of)
        if kept is not None and all(map(operator.is_, kept.rows, cover)):
            kept.weigher.know(rows)
            return kept
        weigher, paths = self.weigher(place, rows, least), self.small.paths(place.tail)
        tallies, done = Tallies(np.zeros((3, len(candidates), weigher.models))), {}
        at = self._apart(place, candidates) if least >= LEAST and len(paths) == 1 else []
        if at:
            apart, heavy = self.templates.weigh(weigher, paths[0], [candidates[i] for i in at])
            tallies.mass[:, at], tallies.leaves = apart.mass, apart.leaves
            done = {i: (*paths[0], int(self.templates.exact[candidates[i]])) for i, closer in zip(at, heavy, strict=True) if not closer}
        if len(self._kept) >= _PLACES:
            self._kept.clear()
        found = self._kept[of] = _Known(cover, weigher, done, tallies)
        return found

    def _apart(self, place: Place, candidates: Sequence[int]) -> list[int]:
        """Which candidates are spelled without touching what stands before them, on neither side, and can be looked up."""
        if place.pending:
            return []
        found = [(at, self.remote.tokens[token]) for at, token in enumerate(candidates) if self.templates.has[token]]
        for side, tail in ((self.small, place.tail), (self.remote, place.remote_tail)):
            if tail:
                found = [(at, data) for at, data in found if side.sealed(tail, data)]
        return [at for at, _ in found]

    def read(self, place: Place, candidates: Sequence[int], rows: Rows, *, least: float = LEAST) -> Shares:
        """S(c) of the candidates from the rows of `cover` and `nodes`; rows of further paths make the bounds narrower."""
        known = self._known(place, candidates, rows, least)
        self._kept.pop((place, tuple(candidates), least))  # rows may be large, and are seldom asked about again
        weigher, place_tally = known.weigher, Tally.empty(known.weigher.models)
        standing = self.boundary(weigher, place, place_tally)
        tallies = Tallies(known.tallies.mass.copy(), [leaf for leaf in known.tallies.leaves if leaf[1] not in rows])
        for at in known.open(rows):
            tallies.mass[:, at] = 0.0
            self.candidate(weigher, place, candidates[at], tallies.of(at))
        parts = np.cumsum(tallies.mass, 0).transpose(0, 2, 1)
        wholes = np.maximum(parts, np.cumsum([place_tally.yes, place_tally.now, place_tally.may], 0)[::-1, :, None])
        lower, now, upper = np.divide(parts, wholes, out=np.zeros(parts.shape), where=wholes > 0)
        neutral = self._neutral[list(candidates)]
        leaves = sorted(place_tally.leaves + tallies.leaves, reverse=True)
        return Shares(now, lower, upper, neutral, tuple(leaves), tuple(standing))

    def neutral(self, token: int) -> bool:
        """Whether a token of the remote has no counterpart in the small model's tokens."""
        return bool(self._neutral[token])

    def _unmatched(self, token: int) -> bool:
        if token in self.remote.vocabulary.control:
            return token not in self.control
        data = self.remote.tokens[token]
        return not data or self.small.written(data) != data

    def boundary(self, weigher: Weigher, place: Place, tally: Tally) -> list[tuple[Path, Float[np.ndarray, " models"]]]:
        """Count the mass of texts in which a token of the remote begins at the end of the prefix; where the models stand then."""
        event = Event(self._theirs(place), place.pending, None)
        standing: list[tuple[Path, Float[np.ndarray, " models"]]] = []
        counted = np.zeros(weigher.models)

        def stands(path: Path) -> None:
            nonlocal counted
            before, counted = counted, tally.yes + tally.now
            standing.append((path, counted - before))

        for path in self.small.paths(place.tail):
            weigher.node(event, path, b"", tally, without=self.void)
            stands(path)
        for overhang in self.small.overhangs(place.tail):
            weigher.tokens(event, overhang.path, overhang.ids, len(place.tail) - overhang.at, b"", tally)
            stands(overhang.path)
        return standing

    def candidate(self, weigher: Weigher, place: Place, token: int, tally: Tally) -> None:
        """Count the mass of texts that the remote's tokenizer goes on with `token`."""
        if token in self.remote.vocabulary.control:
            if token in self.control:
                path = (*self.small.path(place.tail), self.control[token])
                weigher.settle(path, weigher.weight(path), tally, now=True, certain=True, hit=0.0)
            return
        data = self._ours(place, self.remote.tokens[token])
        pending = place.pending if self.remote.tokens[token].startswith(place.pending) else b""
        event = Event(self._theirs(place), pending, token)
        exact, overhangs = self.small.onward(place.tail, data)
        for path in exact:
            weigher.leaf(event, path, data, weigher.weight(path), tally)
        for overhang in overhangs:
            weigher.tokens(event, overhang.path, overhang.ids, len(place.tail) + len(data) - overhang.at, data, tally)
        if pending != place.pending:  # the remote's tokenizer never begins a text with this token, though the remote may
            tally.now += tally.yes
            tally.yes[:] = 0.0


def beginnings(paths: Iterable[Path]) -> list[Path]:
    """The paths and all their beginnings, longer ones first."""
    return list(dict.fromkeys(path[:size] for path in paths for size in range(len(path), -1, -1)))
