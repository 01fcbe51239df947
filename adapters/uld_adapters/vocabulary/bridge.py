"""The small model's probabilities of the remote's tokens, where the two spell texts in different tokens.

    s(c) = P(the remote's spelling has a token beginning at the end of the prefix, and it is c) / P(it has one beginning there)

over the texts that the small model may write after the prefix. With one vocabulary on both sides it is the ordinary probability
of c. Pure: the small model is a function from paths of its tokens to rows of probabilities.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from uld_adapters.vocabulary.control import matched
from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.gathering import Gathering
from uld_adapters.vocabulary.memory import Memory
from uld_adapters.vocabulary.narrow import NarrowWeigher
from uld_adapters.vocabulary.outcome import Event, Outcomes
from uld_adapters.vocabulary.plan import NOTHING, Plan, Planned, closing, make_plan, strays
from uld_adapters.vocabulary.shares import Shares
from uld_adapters.vocabulary.sorting import Sorter
from uld_adapters.vocabulary.tally import LEAST, Tallies, Tally
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_adapters.vocabulary.weigher import Weigher

Path = tuple[int, ...]
_PLACES = 16
_PLANNED, _SPELLED = 2000, 20_000  # places, and plans
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
    """What is kept of a place until it is read: the rows of its cover, and how texts go on with the candidates."""

    rows: list[np.ndarray]
    weigher: Weigher
    planned: list[Planned]


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
        self._neutral = np.fromiter(map(self._unmatched, range(remote.rows)), dtype=bool, count=remote.rows)
        self._kept: dict[tuple[Place, tuple[int, ...], float], _Known] = {}
        self._covers: Memory[bytes, tuple[Path, ...]] = Memory(lambda tail: tuple(beginnings(self.ends(Place(tail, b"")))))
        self._plans: Memory[Place, Memory[int, Planned]] = Memory(lambda place: Memory(partial(self._plan, place)), kept=_PLANNED)
        self._spelled: Memory[tuple[Event, bytes, bytes], Plan] = Memory(
            lambda of: make_plan(self.outcomes, self.small, *of), kept=_SPELLED
        )
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

        `rows` must have the row of every beginning of a path that they have. Spellings that go another way than the candidate's own are
        left out where the rows say that they weigh less than `least`, and nobody reads on after own ones that are lighter than another by
        this factor.
        """
        found: set[Path] = set()
        known = self._known(place, candidates, rows, least)
        for plan, bases in known.planned:
            for path in plan.below:
                found.update(base + path for base in bases)
        for astray in strays(known.weigher, known.planned):
            found.update(astray[:size] for size in range(len(astray) + 1))
        for plan, bases in map(self._plans[place].__getitem__, ahead):
            found.update(known.weigher.heaviest([base + path for base in bases for path in plan.undecided]))
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
        planned = list(map(self._plans[place].__getitem__, candidates))
        if len(self._kept) >= _PLACES:
            self._kept.clear()
        found = self._kept[of] = _Known(cover, self.weigher(place, rows, least), planned)
        return found

    def _plan(self, place: Place, token: int) -> Planned:
        """How texts go on with a candidate, below which paths."""
        if self.neutral(token):
            return NOTHING, ()
        if token in self.control:
            return closing(self.control[token]), (self.small.path(place.tail),)
        data = self._ours(place, self.remote.tokens[token])
        pending = place.pending if self.remote.tokens[token].startswith(place.pending) else b""
        event = Event(self._theirs(place), pending, token).free(self.outcomes, data)
        if place.tail and self.small.sealed(place.tail, data):
            return self._spelled[event, b"", data], self.small.paths(place.tail)
        return self._spelled[event, place.tail, data], ((),)

    def read(self, place: Place, candidates: Sequence[int], rows: Rows, *, least: float = LEAST) -> Shares:
        """S(c) of the candidates from the rows of `cover` and `nodes`; rows of further paths make the bounds narrower."""
        known = self._known(place, candidates, rows, least)
        self._kept.pop((place, tuple(candidates), least))  # rows may be large, and are seldom asked about again
        weigher, whole = known.weigher, Tallies(np.zeros((3, 1, known.weigher.models)))
        standing = self.boundary(weigher, place, whole.of(0))
        narrow = place.pending or least < LEAST
        tallies = self.one_by_one(weigher, place, candidates) if narrow else Gathering(weigher, known.planned).tell()
        parts, wholes = (np.add.accumulate(each.mass, 0).transpose(0, 2, 1) for each in (tallies, whole))
        wholes = np.maximum(parts, wholes[::-1])
        lower, now, upper = np.divide(parts, wholes, out=np.zeros(parts.shape), where=wholes > 0)
        neutral = self._neutral[list(candidates)]
        leaves = sorted(whole.leaves + tallies.leaves, reverse=True)
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

    def one_by_one(self, weigher: Weigher, place: Place, candidates: Sequence[int]) -> Tallies:
        """The tallies of candidates with a look at each of their spellings."""
        tallies = Tallies(np.zeros((3, len(candidates), weigher.models)))
        for at, token in enumerate(candidates):
            self.candidate(weigher, place, token, tallies.of(at))
        return tallies

    def candidate(self, weigher: Weigher, place: Place, token: int, tally: Tally) -> None:
        """Count the mass of texts that the remote's tokenizer goes on with `token`."""
        if token in self.remote.vocabulary.control:
            if token in self.control:
                path = (*self.small.path(place.tail), self.control[token])
                weigher.settle(path, weigher.weight(path), tally, now=True, certain=True, hit=0.0)
            return
        plan, bases = self._plans[place][token]
        for base in bases:
            plan.each(weigher, base, tally)
        if place.pending and not plan.event.pending:  # the remote's tokenizer never begins a text with this token, though the remote may
            tally.now += tally.yes
            tally.yes[:] = 0.0


def beginnings(paths: Iterable[Path]) -> list[Path]:
    """The paths and all their beginnings, longer ones first."""
    return list(dict.fromkeys(path[:size] for path in paths for size in range(len(path), -1, -1)))
