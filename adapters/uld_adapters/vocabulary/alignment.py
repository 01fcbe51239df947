"""Alignments that need no text: the small model's values of the remote's tokens by a gather."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.errors import TokenizerMismatch
from uld_adapters.vocabulary.control import Role, matched
from uld_adapters.vocabulary.tokens import Vocabulary

NOWHERE = -1


class Alignment(Protocol):
    """Which of the small model's tokens are to be read, and what its readings say about the target's tokens."""

    def plan(self, tokens: Sequence[int]) -> list[int]:
        """The small model's ids to read so that the target's ids can be judged."""

    def read(self, excess: np.ndarray) -> np.ndarray:
        """Log p_a - log u in nats by the target's ids, from the same by the small model's, shapes (rows,)."""

    def logprobs(self, values: np.ndarray) -> np.ndarray:
        """Log-probabilities in nats by the target's ids, from those by the small model's, shapes (rows,)."""


@dataclass(frozen=True)
class Identity:
    """Both sides have one tokenizer: ids are the same."""

    def plan(self, tokens: Sequence[int]) -> list[int]:
        """The ids themselves."""
        return list(tokens)

    def read(self, excess: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return excess

    def logprobs(self, values: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return values


@dataclass(frozen=True)
class Gather:
    """Both sides split every text alike, under other ids.

    `rows[a]` are the small model's ids with the bytes of the target's token a, padded with NOWHERE; tokens of the same bytes
    count together: the probability of all, the mean excess. A target token without a counterpart has no excess, and no probability.
    """

    rows: Int[np.ndarray, "target most"]
    silent: int

    def plan(self, tokens: Sequence[int]) -> list[int]:
        """The counterparts; what has none is read as the token `silent`, a control token of the small model."""
        found = self.rows[np.asarray(tokens, dtype=np.int64), 0] if len(tokens) else np.empty(0, dtype=np.int64)
        return [self.silent if token == NOWHERE else int(token) for token in found]

    def read(self, excess: Float[np.ndarray, " small"]) -> Float[np.ndarray, " target"]:
        """Log mean exp of the counterparts' values by the target's ids, 0 where there is none."""
        count = (self.rows != NOWHERE).sum(1)
        return np.where(count > 0, self.logprobs(excess) - np.log(np.maximum(count, 1)), 0.0)

    def logprobs(self, values: Float[np.ndarray, " small"]) -> Float[np.ndarray, " target"]:
        """Log sum exp of the counterparts' values by the target's ids, -inf where there is none."""
        there = self.rows != NOWHERE
        found: np.ndarray = np.logaddexp.reduce(np.where(there, values[np.where(there, self.rows, 0)], -np.inf), axis=1)
        return found


def gather(remote: Vocabulary, small: Vocabulary) -> Gather:
    """The gather from a small vocabulary that splits every text as the remote's does; control tokens go by role."""
    by_bytes: dict[bytes, list[int]] = {}
    for token, data in enumerate(small.tokens):
        if token not in small.control and data:
            by_bytes.setdefault(data, []).append(token)
    control = matched(remote.roles, small.roles, remote.tokens, small.tokens)
    found: list[list[int]] = []
    for token, data in enumerate(remote.tokens):
        if token in remote.control:
            found.append([control[token]] if token in control else [])
        else:
            found.append(by_bytes.get(data, []))
    rows = np.full((len(found), max(map(len, found), default=1)), NOWHERE, dtype=np.int64)
    for token, ids in enumerate(found):
        # The first is what a text is fed as: the same id where that is one of them.
        rows[token, : len(ids)] = [token, *(i for i in ids if i != token)] if token in ids else ids
    ends = [token for token, role in small.roles.items() if role is not Role.OTHER] or sorted(small.control)
    return Gather(rows, ends[0] if ends else 0)


def require_identity(target: str, base: str) -> None:
    """Raise TokenizerMismatch where a base's tokenizer is another than the target's, by their fingerprints."""
    if target != base:
        raise TokenizerMismatch(
            f"the base has another tokenizer ({base[:12]}) than the target ({target[:12]})",
            hint="make a cache in the target's own tokens (`uld-sdk cache` without --base), and train with --cache, --target-tokenizer",
        )
