"""Where training learns what the target says: a cache of a server's answers, or a model that runs here once before training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from uld_offset_models.encoding import Encoded
from uld_offset_models.shift import Tail
from uld_offset_models.target_logits import Known, Support, TopRows, completed, truncated

FrozenLogits = Callable[[], Float[Tensor, "tokens vocab"]]


class TargetSide(Protocol):
    """l_M of training rows, in two halves: what is read of them on the CPU, and the logits made of that on the training's device."""

    def read(self, rows: Sequence[Encoded]) -> Any:
        """What is known at the rows' answer positions, end to end."""

    def support(self, known: Any, labels: Int[Tensor, " tokens"], frozen: FrozenLogits) -> Support:
        """The logits; `frozen` computes l_o over the vocabulary, for who needs them."""


class CachedTarget:
    """A cache's rows under a tail policy; `find(prompt ids, answer ids)` gives what it has of one."""

    def __init__(self, find: Callable[[Sequence[int], Sequence[int]], Known], *, tail: Tail, vocabulary: int) -> None:
        self.find, self.tail, self.vocabulary = find, tail, vocabulary

    def read(self, rows: Sequence[Encoded]) -> TopRows:
        """K, the label's log-probability and the tail mass."""
        return TopRows.joined([self.find(row.ids[: row.start], row.ids[row.start :]) for row in rows])

    def support(self, known: TopRows, labels: Int[Tensor, " tokens"], frozen: FrozenLogits) -> Support:
        """By the tail policy, which a complete distribution does not need."""
        known = known.to(labels.device)
        if known.ids.shape[1] >= self.vocabulary:
            dense = known.logprobs.new_zeros(known.ids.shape).scatter(-1, known.ids, known.logprobs)
            return Support(dense[:, : self.vocabulary], None, labels)
        return completed(known, labels, frozen()) if self.tail == "complete" else truncated(known, labels)


class LocalTarget:
    """Complete distributions, as the target's final hidden states (tokens, width) of each row and its head (rows, width)."""

    def __init__(self, states: Mapping[Encoded, Tensor], head: Tensor) -> None:
        self.states, self.head = states, head

    def read(self, rows: Sequence[Encoded]) -> Float[Tensor, "tokens width"]:
        """The hidden states."""
        return torch.cat([self.states[row] for row in rows])

    def support(self, known: Float[Tensor, "tokens width"], labels: Int[Tensor, " tokens"], frozen: FrozenLogits) -> Support:
        """The target's own logits."""
        head = self.head.to(labels.device)
        return Support(functional.linear(known.to(head), head).float(), None, labels)
