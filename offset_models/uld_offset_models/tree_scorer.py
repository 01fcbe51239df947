"""Scorers of trees: what an assistant or a pair thinks after each path below a text, with the text's caches kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.pair_scorer import PairReading, PairScorer, PairTrack
from uld_offset_models.scorer import Reading, Scorer, Track
from uld_offset_models.tree import Growth, Path, Tree

Asked = tuple[Sequence[int], Sequence[tuple[int, Path]]]


@dataclass
class TreeTrack:
    """One text: its caches, and the final hidden states after each of its tokens but those inside the prompt."""

    inner: Track | PairTrack
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The ids that have been read."""
        return self.inner.tokens

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.inner.rollback(length)
        self.states = {at: state for at, state in self.states.items() if at <= length}


class Node(Protocol):
    """What small models think after a path."""

    @property
    def peak(self) -> float:
        """The largest value in nats, or an upper bound of it."""

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""

    def chances(self) -> Float[np.ndarray, "models rows"]:
        """The probability of every real row of the vocabulary."""


@dataclass(frozen=True)
class AssistantNode:
    """What an assistant thinks after a path; `peak` and `gate` as of a `Reading`."""

    reading: Reading

    @property
    def peak(self) -> float:
        """The largest excess log p_a - log u in nats, or an upper bound of it."""
        return self.reading.peak

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""
        return self.reading.gate

    def chances(self) -> Float[np.ndarray, "1 rows"]:
        """P_a of every token."""
        reading = self.reading
        row = reading.row if reading.row is not None else torch.from_numpy(reading.excess())
        return (row.float().exp() / len(row)).cpu().numpy()[None]


@dataclass(frozen=True)
class PairNode:
    """What a pair thinks after a path; `peak` and `gate` as of a `PairReading`."""

    reading: PairReading

    @property
    def peak(self) -> float:
        """The largest c |log p_o' - log p_o| in nats, or an upper bound of it."""
        return self.reading.peak

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""
        return self.reading.gate

    def chances(self) -> Float[np.ndarray, "2 rows"]:
        """P_o' and p_o of every token."""
        return np.exp(self.reading.logprobs())


class TreeScorer:
    """Reads chains and paths for many texts in one pass, with the head and the gate of an assistant's or a pair's scorer."""

    def __init__(self, scorer: Scorer | PairScorer, *, masks: bool | None = None) -> None:
        self.scorer = scorer
        if isinstance(scorer, PairScorer):
            pair = scorer.pair
            backbones = [pair.tuned.backbone] if pair.shared else [pair.tuned.backbone, pair.frozen.backbone]
        else:
            backbones = [scorer.model.backbone]
        self.trees = [Tree(backbone, masks=masks) for backbone in backbones]

    def track(self) -> TreeTrack:
        """A text of which nothing has been read."""
        return TreeTrack(self.scorer.track())

    @torch.inference_mode()
    def read(self, jobs: Sequence[tuple[TreeTrack, Asked]], *, every: bool = True) -> list[dict[tuple[int, Path], Node]]:
        """For each text (chain, paths): go on with the chain, and read the paths, each below the text's first n tokens as (n, path).

        `every` keeps the states after all of the chain's tokens; a prompt needs the last one only.
        """
        found = self._grow(jobs)
        wanted: list[Tensor] = []
        for (track, (_, paths)), states in zip(jobs, found, strict=True):
            length = len(track.tokens)
            track.states |= {at: state for (at, path), state in states.items() if not path and (every or at == length)}
            wanted += [states[at, path] if path else track.states[at] for at, path in paths]
        if not wanted:
            return [{} for _ in jobs]
        nodes = iter(self._nodes(torch.stack(wanted)))
        return [{node: next(nodes) for node in paths} for _, (_, paths) in jobs]

    def _grow(self, jobs: Sequence[tuple[TreeTrack, Asked]]) -> list[dict[tuple[int, Path], Tensor]]:
        """Final hidden states of each node: of an assistant (width,), of a pair (2, width)."""
        if not isinstance(self.scorer, PairScorer):
            return self.trees[0].grow([Growth(track.inner, chain, paths) for track, (chain, paths) in jobs])  # type: ignore[arg-type]
        sides = [[Growth(getattr(track.inner, side), chain, paths) for track, (chain, paths) in jobs] for side in ("tuned", "frozen")]
        if len(self.trees) == 1:
            both = self.trees[0].grow([*sides[0], *sides[1]])
            tuned, frozen = both[: len(jobs)], both[len(jobs) :]
        else:
            tuned, frozen = (tree.grow(side) for tree, side in zip(self.trees, sides, strict=True))
        return [{node: torch.stack([mine[node], theirs[node]]) for node in mine} for mine, theirs in zip(tuned, frozen, strict=True)]

    def _nodes(self, states: Tensor) -> Sequence[Node]:
        if isinstance(self.scorer, PairScorer):
            return [PairNode(reading) for reading in self.scorer.readings(states[:, 0], states[:, 1])]
        wide = states.float() if self.scorer.model.head.dtype == torch.float32 else states
        return [AssistantNode(reading) for reading in self.scorer.readings(wide)]
