"""The small model's probabilities of the remote's tokens, where the two spell texts in different tokens.

    s(c) = P(the remote's spelling has a token beginning at the end of the prefix, and it is c) / P(it has one beginning there)

over the texts that the small model may write after the prefix. With one vocabulary on both sides it is the ordinary probability
of c. Pure: the small model is a function from paths of its tokens to rows of log-probabilities.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from uld_adapters.vocabulary.control import matched
from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.outcome import Outcomes
from uld_adapters.vocabulary.tally import Event, Tally, Weigher
from uld_adapters.vocabulary.tokens import Vocabulary

Path = tuple[int, ...]
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
class Shares:
    """S(c) of each candidate under each model, the uniform one last, shapes (models, candidates).

    `lower` and `upper` hold whatever text follows; `now` gives each text to the token that the remote's tokenizer sees if the text
    ends there. `slack` is the mass that may yet be c's. `held` is the share of the text of c that stays c's, nan where the small
    model was not asked what follows c. Neutral candidates have no counterpart, and no shift.
    """

    now: Float[np.ndarray, "models candidates"]
    lower: Float[np.ndarray, "models candidates"]
    upper: Float[np.ndarray, "models candidates"]
    slack: Float[np.ndarray, "models candidates"]
    held: Float[np.ndarray, "models candidates"]
    neutral: Bool[np.ndarray, " candidates"]
    open: tuple[tuple[float, Path], ...]


class Bridge:
    """Two vocabularies, and what one's tokens weigh under models of the other.

    A model's place in a text is a path of tokens after those that are certain (`step` returns these as they become so).
    """

    def __init__(self, remote: Vocabulary, small: Vocabulary) -> None:
        self.remote, self.small = Covers(remote), Covers(small)
        self.outcomes = Outcomes(self.remote, self.small.index)
        self.control = matched(remote.roles, small.roles, remote.tokens, small.tokens)
        self.rows = small.rows
        counterparts = set(self.control.values())
        self.void = np.array([i for i in sorted(small.control) if i not in counterparts], dtype=np.int64)
        self._texts = {data: token for token in small.atomic for data in [small.tokens[token]]}

    def start(self) -> Place:
        """The place at the start of a text."""
        ours, theirs = self.small.spelling.start, self.remote.spelling.start
        return Place(ours, theirs, theirs) if ours != theirs else Place(ours, theirs)

    def step(self, place: Place, token: int) -> tuple[Path, Place]:
        """Go on by one of the remote's tokens: the small model's tokens that are certain by now, and the new place."""
        if token in self.remote.vocabulary.control:
            end = (self.control[token],) if token in self.control else ()
            return (*self.small.path(place.tail), *end), Place(b"", b"")
        data = self.remote.tokens[token]
        certain, tail = self.small.advance(place.tail + self._ours(place, data))
        _, remote_tail = self.remote.advance(self._theirs(place) + data)
        return certain, Place(tail, remote_tail)

    def _ours(self, place: Place, data: bytes) -> bytes:
        """A token's bytes as the small model's text has them."""
        return data[len(place.pending) :] if place.pending and data.startswith(place.pending) else data

    def _theirs(self, place: Place) -> bytes:
        return b"" if place.pending else place.remote_tail

    def cover(self, place: Place) -> list[Path]:
        """The paths at which the small model may stand when the prefix ends."""
        return [*self.small.paths(place.tail), *(overhang.path for overhang in self.small.overhangs(place.tail))]

    def nodes(self, place: Place, candidates: Sequence[int], *, ahead: Iterable[int] = ()) -> set[Path]:
        """All paths whose rows `read` needs; with `ahead` also those after these candidates."""
        found = {path[:size] for path in self.cover(place) for size in range(len(path) + 1)}
        for token in candidates:
            if token not in self.remote.vocabulary.control:
                exact, overhangs = self.small.onward(place.tail, self._ours(place, self.remote.tokens[token]))
                found.update(path[:size] for path in exact for size in range(len(path)))
                found.update(o.path[:size] for o in overhangs for size in range(len(o.path) + 1))
        for token in ahead:
            if token not in self.remote.vocabulary.control:
                found.update(self.small.onward(place.tail, self._ours(place, self.remote.tokens[token]))[0])
        return found

    def read(self, place: Place, candidates: Sequence[int], rows: Rows) -> Shares:
        """S(c) of the candidates from the rows of `nodes`; rows of further paths make the bounds narrower."""
        weigher = Weigher(self.outcomes, self.small, rows, self.rows)
        models = weigher.models
        place_tally = self._boundary(weigher, place)
        columns = [self._candidate(weigher, place, token) for token in candidates]
        lower, now, upper, held = (np.empty((models, len(columns))) for _ in range(4))
        for at, tally in enumerate(columns):
            lower[:, at], now[:, at], upper[:, at] = tally.yes, tally.yes + tally.now, tally.yes + tally.now + tally.may
            held[:, at] = tally.held
        least, likely = place_tally.yes[:, None], (place_tally.yes + place_tally.now)[:, None]
        most = likely + place_tally.may[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = [np.nan_to_num(part) for part in (now / np.maximum(likely, now), lower / most, upper / np.maximum(least, upper))]
            slack = np.nan_to_num((upper - now) / np.maximum(likely, now))
        neutral = np.array([self._neutral(token) for token in candidates], dtype=bool)
        leaves = sorted((leaf for tally in [place_tally, *columns] for leaf in tally.leaves), reverse=True)
        return Shares(shares[0], shares[1], shares[2], slack, held, neutral, tuple(leaves))

    def _neutral(self, token: int) -> bool:
        if token in self.remote.vocabulary.control:
            return token not in self.control
        return not self.remote.tokens[token]

    def _boundary(self, weigher: Weigher, place: Place) -> Tally:
        """The mass of texts in which a token of the remote begins at the end of the prefix."""
        event = Event(self._theirs(place), place.pending, None)
        tally = Tally(weigher.models)
        for path in self.small.paths(place.tail):
            weigher.node(event, path, b"", tally, without=self.void)
        for overhang in self.small.overhangs(place.tail):
            weigher.tokens(event, overhang.path, overhang.ids, len(place.tail) - overhang.at, b"", tally)
        return tally

    def _candidate(self, weigher: Weigher, place: Place, token: int) -> Tally:
        """The mass of texts that the remote's tokenizer goes on with `token`."""
        tally = Tally(weigher.models)
        if token in self.remote.vocabulary.control:
            if token in self.control:
                path = self.small.path(place.tail)
                tally.yes += weigher.weight(path) * weigher.chance(path, np.array([self.control[token]]))[:, 0]
            return tally
        data = self._ours(place, self.remote.tokens[token])
        pending = place.pending if self.remote.tokens[token].startswith(place.pending) else b""
        event = Event(self._theirs(place), pending, token)
        exact, overhangs = self.small.onward(place.tail, data)
        for path in exact:
            weigher.leaf(event, path, data, weigher.weight(path), tally)
        if exact[0] in weigher.rows:
            with np.errstate(divide="ignore", invalid="ignore"):
                tally.held = (tally.yes + tally.now) / sum(weigher.weight(path) for path in exact)
        for overhang in overhangs:
            weigher.tokens(event, overhang.path, overhang.ids, len(place.tail) + len(data) - overhang.at, data, tally)
        return tally
