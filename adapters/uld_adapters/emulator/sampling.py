"""How the emulated servers turn log-probabilities into a token, and which of them they report."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

Row = Float[np.ndarray, " vocab"]


@dataclass(frozen=True)
class Warp:
    """Temperature, then min_p, top_k and top_p; neutral values change nothing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    bias: Mapping[int, float] = field(default_factory=dict)

    def __call__(self, row: Row) -> Row:
        """Log q in nats, renormalised; masked tokens are -inf. Ties at the border of top_k all stay."""
        if self == Warp():
            return row
        values = row.astype(np.float64)
        for token, bias in self.bias.items():
            values[token] += bias
        values = _normalised(values / self.temperature)
        if self.min_p:
            values[values < values.max() + np.log(self.min_p)] = -np.inf
        if self.top_k is not None and self.top_k < values.size:
            values[values < np.partition(values, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p is not None and self.top_p < 1.0:
            values = _normalised(values)
            order = np.argsort(-values, kind="stable")
            before = np.cumsum(np.exp(values[order])) - np.exp(values[order])  # mass of all more probable tokens
            values[order[before >= self.top_p]] = -np.inf
        return _normalised(values).astype(np.float32)


def _normalised(values: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    top = values.max()
    return values - (top + np.log(np.exp(values - top).sum()))


class Sampler:
    """Draws tokens from log q: the most probable (of equals the lowest id) without a seed, else by inverse distribution."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else np.random.default_rng(seed)

    def __call__(self, row: Row) -> int:
        """One token id."""
        if self._random is None:
            return int(np.argmax(row))
        mass = np.cumsum(np.exp(row.astype(np.float64)))
        token = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        return min(token, int(np.flatnonzero(np.isfinite(row))[-1]))


def top(row: Row, k: int, *, ties: bool = False) -> Int[np.ndarray, " k"]:
    """The ids of the k most probable tokens, of equals the lowest id first; with `ties` also all that equal the k-th."""
    k = min(k, row.size)
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    border = np.partition(row, -k)[-k]
    ids = np.flatnonzero(row >= border)
    ids = ids[np.argsort(-row[ids], kind="stable")]
    return ids if ties and np.isfinite(border) else ids[:k]
