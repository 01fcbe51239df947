"""Texts of one or several artifacts that share a backbone: one pass through it for all of them, and one through the output head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Job = tuple[Any, Sequence[int]]  # a track and the tokens that are new to it


@dataclass(frozen=True)
class Pending:
    """Positions about which only the output head can tell more: `finish` makes the readings of all out of W h of these."""

    hidden: Float[Tensor, "n hidden"]
    finish: Callable[[Float[Tensor, "n rows"]], list[Any]]


class Member(Protocol):
    """An artifact's own part in reading along: `Scorer` of an assistant, `PairScorer` of a pair."""

    def track(self) -> Any:
        """A text of which nothing has been read; `member` is 0."""

    def texts(self, track: Any) -> list[Any]:
        """The texts that go through the backbone for a track."""

    def forward(self, jobs: list[tuple[Any, list[int]]]) -> list[Float[Tensor, "tokens hidden"]]:
        """Feed each text its new tokens in one pass; final hidden states, padded on the right."""

    def head(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n rows"]:
        """W h."""

    def pending(self, states: Sequence[Float[Tensor, "n hidden"]]) -> Pending:
        """The positions of which a reading is wanted, by the final hidden states of each of `texts`."""


@torch.inference_mode()
def read_batch(members: Sequence[Member], jobs: Sequence[Job], *, every: bool) -> list[list[Any]]:
    """Feed each track its new tokens in one batched pass; one reading after each new token (only the last: every=False).

    The members have one backbone and one head; a track's `member` is the place of its own.
    """
    feed = [[(text, list(new)) for text in members[track.member].texts(track)] for track, new in jobs]
    passed = iter(members[0].forward([text for texts in feed for text in texts]))
    states = [[next(passed)[0 if every else len(new) - 1 : len(new)] for _, new in texts] for texts in feed]
    return judged(members, [track.member for track, _ in jobs], states)


def judged(members: Sequence[Member], owners: Sequence[int], states: Sequence[Sequence[Float[Tensor, "n hidden"]]]) -> list[list[Any]]:
    """Readings of positions by the final hidden states of each of a job's `texts`, in one pass through the head; `owners` are members."""
    pending = {}
    for owner in sorted(set(owners)):
        mine = [texts for texts, of in zip(states, owners, strict=True) if of == owner]
        pending[owner] = members[owner].pending([torch.cat(text) for text in zip(*mine, strict=True)])
    counts = [len(each.hidden) for each in pending.values()]
    logits = torch.split(members[0].head(torch.cat([each.hidden for each in pending.values()])), counts)
    found = {owner: iter(each.finish(of)) for (owner, each), of in zip(pending.items(), logits, strict=True)}
    return [[next(found[owner]) for _ in texts[0]] for owner, texts in zip(owners, states, strict=True)]


class GroupScorer:
    """Reads along for several artifacts of one backbone: whatever their texts want is one batch."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)

    def track(self, member: int) -> Any:
        """A text of which nothing has been read, for the artifact at this place."""
        track = self.members[member].track()
        track.member = member
        return track

    def read(self, jobs: Sequence[Job], *, every: bool = True) -> list[list[Any]]:
        """Feed each track its new tokens; see `read_batch`."""
        return read_batch(self.members, jobs, every=every)
