"""A text as a small model has read it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Track:
    """One text as the small model has read it: ids, and for each layer keys and values of shape (heads, tokens, head_dim).

    The keys and values begin with those of `virtual` tokens, which have no ids. `adapter` is the place of the text's adapter among
    those of the backbone, `member` that of the artifact in a `GroupScorer`. `running` are the caches after the first n tokens, by n, of
    a model that holds a running state, instead of `layers`.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    virtual: int = 0
    adapter: int = 0
    member: int = 0
    running: dict[int, Any] = field(default_factory=dict)

    @property
    def past(self) -> int:
        """How many tokens have been read, virtual ones included."""
        return self.virtual + len(self.tokens)

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.tokens = self.tokens[:length]
        self.layers = [(keys[:, : self.past], values[:, : self.past]) for keys, values in self.layers]
        self.running = {at: cache for at, cache in self.running.items() if at <= length}
