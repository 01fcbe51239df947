"""What the remote's tokenizer makes of a text at a given place: a token that begins there, or none."""

from dataclasses import dataclass
from typing import NamedTuple

from uld_adapters.vocabulary.cover import Covers, remembered
from uld_adapters.vocabulary.index import Group, TokenIndex

NONE = -1  # no token begins at the place


@dataclass(frozen=True)
class Outcome:
    """The token that begins at the place: `now` if the text ends here, one of `possible` or `opened` whatever follows.

    `opened` are the tokens that begin with all of the text after the place and go beyond it.
    """

    now: int
    possible: frozenset[int]
    opened: frozenset[int]

    @property
    def certain(self) -> bool:
        """Whether nothing that follows can change it."""
        return not self.opened and len(self.possible) == 1

    def may_be(self, token: int) -> bool:
        """Whether the token may begin at the place."""
        return token in self.possible or token in self.opened

    @property
    def bounded(self) -> bool | None:
        """Whether any token begins at the place, None where that is open."""
        if NONE not in self.possible:
            return True
        return False if not self.opened and len(self.possible) == 1 else None


class Outcomes:
    """Outcomes of texts in the remote's vocabulary, and which of the small model's tokens could change them."""

    def __init__(self, remote: Covers, small: TokenIndex) -> None:
        self.remote, self.small = remote, small
        self._outcomes: dict[bytes, Outcome] = {}
        self._free: dict[bytes, Outcome] = {}
        self._hitters: dict[bytes, Group] = {}

    def of(self, tail: bytes, more: bytes) -> Outcome:
        """What begins after the tail of a prefix, if the text goes on with `more`."""
        more = self.remote.written(more)
        if not tail or (more and self.remote.sealed(tail, more)):
            return remembered(self._free, more, lambda: self._find(b"", more))
        return remembered(self._outcomes, len(tail).to_bytes(4, "big") + tail + more, lambda: self._find(tail, more))

    def _find(self, tail: bytes, more: bytes) -> Outcome:
        text, place = tail + more, len(tail)
        ends = [self._begins(path, place) for path in self.remote.paths(text)]
        now, possible, opened = ends[0], set(ends), frozenset[int]()
        for overhang in self.remote.overhangs(text):
            if overhang.at == place:
                opened = frozenset(overhang.ids.tolist())
            elif overhang.at < place:
                possible.add(NONE)
            else:
                possible.add(self._begins(overhang.path, place))
        if not more:  # nothing begins yet, but a token may end here
            return Outcome(now, frozenset(possible), frozenset())
        return Outcome(now, frozenset(possible), opened)

    def _begins(self, path: tuple[int, ...], place: int) -> int:
        at = 0
        for token in path:
            if at == place:
                return token
            if at > place:
                return NONE
            at += len(self.remote.tokens[token])
        return ENDS if at == place else NONE

    def hitters(self, tail: bytes, more: bytes) -> Group:
        """The small model's tokens after which the outcome may be another: those that begin as a token reaching beyond the text goes on."""
        more = self.remote.written(more)
        if tail and more and self.remote.sealed(tail, more):
            tail = b""
        return remembered(self._hitters, len(tail).to_bytes(4, "big") + tail + more, lambda: self._hit(tail + more))

    def _hit(self, text: bytes) -> Group:
        if len(self.remote.paths(text)) > 1:
            return self.small.whole  # whatever goes on with the word changes its tokens
        firsts: set[int] = set()
        for overhang in self.remote.overhangs(text):
            firsts |= self.remote.bytes_at(overhang.ids, len(text) - overhang.at)
        return self.small.starting(frozenset(firsts))


class Event(NamedTuple):
    """That the token `token` of the remote begins where `tail` ends, or (None) that any does.

    The small model's text is the remote's without the bytes `pending` at its start.
    """

    tail: bytes
    pending: bytes
    token: int | None

    def judge(self, outcomes: Outcomes, more: bytes) -> tuple[bool, bool]:
        """Whether it holds for a text that ends with `more`, and whether that is so whatever follows."""
        outcome = outcomes.of(self.tail, self.pending + more)
        if self.token is None:
            return outcome.now != NONE, outcome.bounded is not None
        return outcome.now == self.token, outcome.certain or not outcome.may_be(self.token)


ENDS = -2  # the text ends at the place
