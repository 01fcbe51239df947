"""How the target's tokens and the small model's belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from uld_adapters.errors import TokenizerMismatch


class Alignment(Protocol):
    """Which of the small model's tokens are to be read, and what its readings say about the target's tokens."""

    def plan(self, tokens: Sequence[int]) -> list[int]:
        """The small model's ids to read so that the target's ids can be judged."""

    def read(self, excess: np.ndarray) -> np.ndarray:
        """Log p_a - log u in nats by the target's ids, from the same by the small model's, shapes (rows,)."""


@dataclass(frozen=True)
class Identity:
    """Both sides have one tokenizer: ids are the same."""

    def plan(self, tokens: Sequence[int]) -> list[int]:
        """The ids themselves."""
        return list(tokens)

    def read(self, excess: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return excess


def classify(target: str, small: str) -> Alignment:
    """The alignment of two tokenizers by their fingerprints; raises TokenizerMismatch when they differ."""
    if target != small:
        raise TokenizerMismatch(
            f"the assistant was trained for another tokenizer ({small[:12]}) than the target's ({target[:12]})",
            hint="train an assistant whose base shares the target's tokenizer",
        )
    return Identity()
