"""What a sweep keeps of one position: K and the few values of the small model's vocabulary that decide there."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from uld_adapters.errors import MalformedAnswer
from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import SmallReading


@dataclass(frozen=True)
class KeptReading:
    """A small model's reading by the ids of its `Position`: `values` are log p_a - log u in nats."""

    peak: float
    gate: float | None
    values: Float[np.ndarray, " kept"]

    def bounds(self) -> None:
        """The values are exact."""

    def excess(self) -> Float[np.ndarray, " kept"]:
        """Log p_a(y|x) - log u(y) in nats, shape (kept,)."""
        return self.values


@dataclass(frozen=True)
class Position:
    """One token of an answer, in a vocabulary of its own so small that a sweep can keep thousands.

    Its ids are those of K in their order (so that ties break alike), then one for all tokens outside K, then the label where it
    is outside. Of the tokens outside K only the least excess matters: g falls with the excess, so that it gives the largest g,
    for every alpha and margin. The functions of generation take such a position as they take a whole one.

    `logprob` is log p_M(label) in nats, NaN where the server does not say; `own` is the remote's own greedy token, -1 where
    it is outside K.
    """

    label: int
    logprob: float
    own: int
    top: TopLogprobs
    reading: KeptReading


@dataclass(frozen=True)
class Observed:
    """An answer of so many `tokens`; `positions` are those that some rule of the sweep may touch."""

    tokens: int
    positions: tuple[Position, ...]

    @property
    def settled(self) -> int:
        """How many positions stay untouched under every rule of the sweep."""
        return self.tokens - len(self.positions)


def kept_position(top: TopLogprobs, reading: SmallReading, *, label: int, logprob: float, own: int, ratio: float) -> Position:
    """Keep of a position what filters of at least `ratio` need; raises `MalformedAnswer` for a label without a row.

    A complete K is cut to the tokens that such a filter may keep.
    """
    excess = reading.excess()
    if label >= excess.size:
        raise MalformedAnswer(f"the server wrote token {label}, which its tokenizer does not have")
    ids, logprobs = top.ids, top.logprobs
    real = ids < excess.size
    if top.complete and real.any():
        inside = logprobs >= logprobs[real][0] + np.log(ratio)
        ids, logprobs, real = ids[inside], logprobs[inside], real[inside]
    known = np.sort(ids[real])
    values = excess[known]
    if not top.complete and known.size < excess.size:
        outside = np.ones(excess.size, dtype=bool)
        outside[known] = False
        values = np.append(values, excess[outside].min())
    named = {int(token): place for place, token in enumerate(known)}
    if label not in named:
        named[label] = values.size
        values = np.append(values, excess[label])
    places = np.empty(ids.size, dtype=np.int64)
    places[real] = np.searchsorted(known, ids[real])
    places[~real] = values.size + np.arange(int((~real).sum()))  # padding stays beyond the vocabulary, where it is dropped
    kept = KeptReading(reading.peak, reading.gate, values)
    return Position(named[label], logprob, named.get(own, -1), TopLogprobs(places, logprobs, top.complete), kept)
