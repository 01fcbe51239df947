"""A scorer of trees: what the small model thinks after each path below a text, with the text's caches kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.scorer import Reading, Scorer, Track
from uld_offset_models.tree import Growth, Path, Tree


@dataclass
class TreeTrack:
    """One text: its caches, and the final hidden state after each of its tokens but those of the prompt's inside."""

    track: Track = field(default_factory=Track)
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The ids that have been read."""
        return self.track.tokens

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.track.rollback(length)
        self.states = {at: state for at, state in self.states.items() if at <= length}


@dataclass(frozen=True)
class Node:
    """What the small model thinks after a path; `peak` and `gate` as of a `Reading`."""

    reading: Reading

    @property
    def peak(self) -> float:
        """The largest excess log p_a - log u in nats, or an upper bound of it."""
        return self.reading.peak

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""
        return self.reading.gate

    def logprobs(self) -> Float[np.ndarray, "models rows"]:
        """Log p_a of every real row of the vocabulary in nats."""
        reading = self.reading
        row = reading.row if reading.row is not None else torch.from_numpy(reading.excess())
        return row.float().cpu().numpy()[None] - np.float32(np.log(len(row)))


class TreeScorer:
    """Reads chains and paths for many texts in one pass, with the head and the gate of a `Scorer`."""

    def __init__(self, scorer: Scorer, *, masks: bool | None = None) -> None:
        self.scorer = scorer
        self.tree = Tree(scorer.model.backbone, masks=masks)

    def track(self) -> TreeTrack:
        """A text of which nothing has been read."""
        return TreeTrack()

    @torch.inference_mode()
    def read(
        self, jobs: Sequence[tuple[TreeTrack, tuple[Sequence[int], Sequence[tuple[int, Path]]]]], *, every: bool = True
    ) -> list[dict[tuple[int, Path], Node]]:
        """For each text (chain, paths): go on with the chain, and read the paths, each below the text's first n tokens as (n, path).

        `every` keeps the states after all of the chain's tokens; a prompt needs the last one only.
        """
        found = self.tree.grow([Growth(track.track, chain, paths) for track, (chain, paths) in jobs])
        wanted: list[Tensor] = []
        for (track, (chain, paths)), states in zip(jobs, found, strict=True):
            length = len(track.tokens)
            kept = {at: state for (at, path), state in states.items() if not path and (every or at == length)}
            track.states |= kept
            wanted += [states[at, path] if path else track.states[at] for at, path in paths]
        if not wanted:
            return [{} for _ in jobs]
        stacked = torch.stack(wanted)
        readings = iter(self.scorer._readings(stacked.float() if self.scorer.model.head.dtype == torch.float32 else stacked))
        return [{node: Node(next(readings)) for node in paths} for _, (_, paths) in jobs]
