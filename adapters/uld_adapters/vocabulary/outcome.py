"""What the remote's tokenizer makes of a text at a given place: a token that begins there, or none."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.index import ANY, Group
from uld_adapters.vocabulary.memory import Memory

Halves = tuple[Int[np.ndarray, " some"], Int[np.ndarray, " others"]]
NONE = -1  # no token begins at the place
CROWD = 256  # so many tokens in one place are not looked at one by one
_FEW = 64  # so many texts are spelled one by one
_KEPT = 50_000
_WIDEST = 64  # bits of a machine word
_NOTHING = np.array([], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The token that begins at the place: `now` if the text ends here, one of `possible` or `opened` whatever follows.

    `opened` are the tokens that begin with all of the text after the place and go beyond it.
    """

    now: int
    possible: frozenset[int]
    opened: Int[np.ndarray, " opened"]

    @property
    def certain(self) -> bool:
        """Whether nothing that follows can change it."""
        return not self.opened.size and len(self.possible) == 1

    def may_be(self, token: int) -> bool:
        """Whether the token may begin at the place."""
        return token in self.possible or token in self.opened

    @property
    def bounded(self) -> bool | None:
        """Whether any token begins at the place, None where that is open."""
        if NONE not in self.possible:
            return True
        return False if self.certain else None


class Outcomes:
    """Outcomes of texts in the remote's vocabulary, and which of the small model's tokens could change them."""

    def __init__(self, remote: Covers, small: Covers) -> None:
        self.remote, self.small, self._tokens = remote, small.index, small.tokens
        self._outcomes = Memory(self._find)
        self._hits = Memory(self._hit)
        self._verdicts = Memory(self._judge)
        self._ending: dict[tuple[Event, bytes, int], tuple[Int[np.ndarray, " n"], Halves]] = {}
        self._cuts = self._cut()

    def of(self, tail: bytes, more: bytes) -> Outcome:
        """What begins after the tail of a prefix, if the text goes on with `more`."""
        more = self.remote.written(more)
        return self._outcomes[b"" if more and tail and self.remote.sealed(tail, more) else tail, more]

    def _find(self, key: tuple[bytes, bytes]) -> Outcome:
        tail, more = key
        text, place = tail + more, len(tail)
        ends = [self._begins(path, place) for path in self.remote.paths(text)]
        now, possible, opened = ends[0], set(ends), _NOTHING
        for overhang in self.remote.overhangs(text):
            if overhang.at == place:
                opened = overhang.ids
            elif overhang.at < place:
                possible.add(NONE)
            else:
                possible.add(self._begins(overhang.path, place))
        return Outcome(now, frozenset(possible), opened if more else _NOTHING)  # without more nothing begins yet, but a token may end here

    def _cut(self) -> UInt64[np.ndarray, " small_rows"]:
        """Where the remote's tokens begin and end in each of the small model's, taken as a text: bit n stands for its byte n."""
        found = np.zeros(len(self._tokens), dtype=np.uint64)
        single = self.remote.index.exact
        for token in self.small.ids.tolist():
            data, at, cuts = self.remote.written(self._tokens[token]), 0, 1
            for piece in (single[data],) if data in single else self.remote.spelling.encode(data, ended=False):
                at += len(self.remote.tokens[piece])
                cuts |= 1 << at
            found[token] = cuts & (1 << _WIDEST) - 1
        return found

    def ending(self, event: "Event", more: bytes, skip: int, ids: Int[np.ndarray, " n"]) -> Halves:
        """Which of the tokens an event holds with, if the text goes on with `more` and ends with the token; and which others.

        The first `skip` bytes of the tokens are in `more` already. Tokens of which nobody can tell at a glance are among the others,
        unless they are few.
        """
        known = self._ending.get((event, more, skip))
        if known is None or known[0] is not ids:
            free = event.free(self, more)
            halves = self._halve(event, more, skip, ids) if free is event else self.ending(free, more, skip, ids)
            if len(self._ending) >= _KEPT:
                self._ending.clear()
            known = self._ending[event, more, skip] = ids, halves
        return known[1]

    def _halve(self, event: "Event", more: bytes, skip: int, ids: Int[np.ndarray, " n"]) -> Halves:
        if not event.tail and event.token is None:
            return ids, ids[:0]
        if not event.pending and skip == len(event.tail) + len(more) < _WIDEST:
            holds = self._seen(event, ids)
        elif ids.size <= _FEW:
            holds = self._tried(event, [more + self._tokens[i][skip:] for i in ids.tolist()])
        else:
            return ids[:0], ids
        return np.sort(ids[holds]), np.sort(ids[~holds])

    def _seen(self, event: "Event", ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """With which tokens an event holds whose tail they begin with."""
        data = b"" if event.token is None else self.remote.tokens[event.token]
        cuts = self._cuts[ids] >> np.uint64(len(event.tail))
        return cuts & np.uint64((2 << len(data)) - 1) == np.uint64(1 | 1 << len(data))

    def _tried(self, event: "Event", texts: Iterable[bytes]) -> Bool[np.ndarray, " n"]:
        """Which texts an event holds for that end."""
        spelled = (self.remote.spelling.encode(event.tail + self.remote.written(event.pending + text), ended=False) for text in texts)
        begun = np.array([self._begins(path, len(event.tail)) for path in spelled])
        return begun != NONE if event.token is None else begun == event.token

    def _begins(self, path: tuple[int, ...], place: int) -> int:
        at = 0
        for token in path:
            if at == place:
                return token
            if at > place:
                return NONE
            at += len(self.remote.tokens[token])
        return ENDS if at == place else NONE

    def judge(self, event: "Event", more: bytes) -> tuple[bool, bool]:
        """Whether an event holds for a text that ends with `more`, and whether that is so whatever follows."""
        return self._verdicts[event, more]

    def _judge(self, key: tuple["Event", bytes]) -> tuple[bool, bool]:
        event, more = key
        outcome = self.of(event.tail, event.pending + more)
        if event.token is None:
            return outcome.now != NONE, outcome.bounded is not None
        return outcome.now == event.token, outcome.certain or not outcome.may_be(event.token)

    def hit(self, event: "Event", more: bytes) -> float:
        """The share of the small model's tokens after which an event may be otherwise."""
        return self.hitters(event, more).ids.size / len(self._tokens)

    def hitters(self, event: "Event", more: bytes) -> Group:
        """The small model's tokens after which an event may be otherwise: those that begin as a token reaching beyond the text goes on."""
        tail, more = event.tail, self.remote.written(event.pending + more)
        return self.small.starting(self._hits[more if tail and more and self.remote.sealed(tail, more) else tail + more])

    def _hit(self, text: bytes) -> int:
        if len(self.remote.paths(text)) > 1:
            return ANY  # whatever goes on with the word changes its tokens
        firsts: set[int] = set()
        for overhang in self.remote.overhangs(text):
            firsts |= self.remote.bytes_at(overhang.ids, len(text) - overhang.at)
        return sum(1 << byte for byte in firsts)


class Event(NamedTuple):
    """That the token `token` of the remote begins where `tail` ends, or (None) that any does.

    The small model's text is the remote's without the bytes `pending` at its start.
    """

    tail: bytes
    pending: bytes
    token: int | None

    def free(self, outcomes: Outcomes, more: bytes) -> "Event":
        """The same event without its tail, where that and what follows are spelled apart."""
        following = self.pending + more
        return self._replace(tail=b"") if self.tail and following and outcomes.remote.sealed(self.tail, following) else self


ENDS = -2  # the text ends at the place
