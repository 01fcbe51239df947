"""Scorers of trees: what an assistant or a pair thinks after each path below a text, with the text's caches kept."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.batch_reading import judged
from uld_offset_models.pair_scorer import PairReading, PairScorer, PairTrack
from uld_offset_models.scorer import Scorer
from uld_offset_models.track import Track
from uld_offset_models.tree import Growth, Path, Tree

Asked = tuple[Sequence[int], Sequence[tuple[int, Path]]]


@dataclass
class TreeTrack:
    """One text: its caches, and the final hidden states after each of its tokens but those inside the prompt.

    `member` is the place of its artifact in a `TreeScorer`.
    """

    inner: Track | PairTrack
    member: int = 0
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The ids that have been read."""
        return self.inner.tokens

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.inner.rollback(length)
        self.states = {at: state for at, state in self.states.items() if at <= length}


@dataclass(frozen=True)
class Node(ABC):
    """What small models think after a path."""

    reading: Any

    @property
    def peak(self) -> float:
        """The reading's: the largest excess, of a pair the largest size of a change, in nats, or an upper bound of it."""
        return float(self.reading.peak)

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""
        found: float | None = self.reading.gate
        return found

    @abstractmethod
    def chances(self) -> Float[np.ndarray, "models rows"]:
        """The probability of every real row of the vocabulary."""


class AssistantNode(Node):
    """What an assistant thinks after a path, out of its `Reading`."""

    def chances(self) -> Float[np.ndarray, "1 rows"]:
        """P_a of every token."""
        reading = self.reading
        row = reading.row if reading.row is not None else torch.from_numpy(reading.excess())
        return (row.float().exp() / len(row)).cpu().numpy()[None]


class PairNode(Node):
    """What a pair thinks after a path, out of its `PairReading`."""

    def chances(self) -> Float[np.ndarray, "2 rows"]:
        """P_o' and p_o of every token."""
        return np.exp(self.reading.logprobs())


class TreeScorer:
    """Reads chains and paths for many texts in one pass, with the heads and gates of artifacts that share a backbone."""

    def __init__(self, members: Sequence[Scorer | PairScorer], *, masks: bool | None = None) -> None:
        self.members = tuple(members)
        self.wide = members[0].models[0].head.dtype == torch.float32
        self.trees: dict[int, Tree] = {}
        for model in [model for member in members for model in member.models]:
            self.trees.setdefault(id(model.backbone), Tree(model.backbone, parts=model.parts, masks=masks))

    def track(self, member: int = 0) -> TreeTrack:
        """A text of which nothing has been read, for the artifact at this place."""
        return TreeTrack(self.members[member].track(), member)

    @torch.inference_mode()
    def read(self, jobs: Sequence[tuple[TreeTrack, Asked]], *, every: bool = True) -> list[dict[tuple[int, Path], Node]]:
        """For each text (chain, paths): go on with the chain, and read the paths, each below the text's first n tokens as (n, path).

        `every` keeps the states after all of the chain's tokens; a prompt needs the last one only.
        """
        asked, states = [], []
        for (track, (_, paths)), found in zip(jobs, self._grow(jobs), strict=True):
            length = len(track.tokens)
            track.states |= {at: state for (at, path), state in found.items() if not path and (every or at == length)}
            if paths:
                wanted = torch.stack([found[at, path] if path else track.states[at] for at, path in paths], 1)
                wanted = wanted.float() if self.wide else wanted
                asked.append(track.member)
                states.append(list(wanted))
        readings = iter(judged(self.members, asked, states) if asked else ())
        return [
            {node: _node(reading) for node, reading in zip(paths, next(readings), strict=True)} if paths else {} for _, (_, paths) in jobs
        ]

    def _grow(self, jobs: Sequence[tuple[TreeTrack, Asked]]) -> list[dict[tuple[int, Path], Float[Tensor, "texts width"]]]:
        """Final hidden states of each node, in every text that a track has."""
        owned: dict[int, list[tuple[int, Growth]]] = {tree: [] for tree in self.trees}
        for number, (track, (chain, paths)) in enumerate(jobs):
            member: Any = self.members[track.member]
            for model, text in zip(member.models, member.texts(track.inner), strict=True):
                owned[id(model.backbone)].append((number, Growth(text, chain, paths)))
        found: list[list[dict[tuple[int, Path], Tensor]]] = [[] for _ in jobs]
        for tree, growths in owned.items():
            for (number, _), states in zip(growths, self.trees[tree].grow([growth for _, growth in growths]), strict=True):
                found[number].append(states)
        return [{node: torch.stack([states[node] for states in texts]) for node in texts[0]} for texts in found]


def _node(reading: Any) -> Node:
    return PairNode(reading) if isinstance(reading, PairReading) else AssistantNode(reading)
