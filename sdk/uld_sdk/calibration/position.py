"""What a sweep keeps of one position: K and the few values of the small model's vocabulary that decide there."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.errors import MalformedAnswer
from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Bounds, Rule, SmallReading, unreported

_NEVER = -1e4  # nats of change that no token has: none can win with it


@dataclass(frozen=True)
class KeptReading:
    """A small model's reading by the ids of its `Position`: `values` are what `excess` says, `ends` what `bounds` does.

    `tail` is log p_o of the frozen model in nats, None where nobody completes a report.
    """

    peak: float
    gate: float | None
    values: Float[np.ndarray, " kept"]
    ends: Bounds | None = None
    tail: Float[np.ndarray, " kept"] | None = None

    def bounds(self) -> Bounds | None:
        """The least and the most that the values can be, None where they are exact."""
        return self.ends

    def excess(self) -> Float[np.ndarray, " kept"]:
        """Log p_a(y|x) - log u(y), or of a pair c (log p_o'(y|x) - log p_o(y|x)), in nats, shape (kept,)."""
        return self.values

    def frozen(self) -> Float[np.ndarray, " kept"] | None:
        """Log p_o(y|x) in nats, shape (kept,)."""
        return self.tail


@dataclass(frozen=True)
class Position:
    """One token of an answer, in a vocabulary of its own so small that a sweep can keep thousands.

    Its ids are those of K in their order (so that ties break alike), the label where it is outside, and some that stand for the
    tokens outside K. Of an assistant that is one, with the least excess: g falls with the excess, so that it gives the largest g,
    for every alpha and margin. Of a pair it has the largest change, for the same reason. Where the frozen model completes the
    report they are the tokens that no other exceeds in p_o and in change, for none but these can come first, and the mass of the
    rest in shares that cannot. The functions of generation take such a position as they take a whole one.

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


def kept_position(top: TopLogprobs, reading: SmallReading, rule: Rule, *, label: int, logprob: float, own: int) -> Position:
    """Keep of a position what rules like this one need, with any alpha and margin and no smaller filter.

    A complete K is cut to the tokens that such a filter may keep. Raises `MalformedAnswer` for a label without a row.
    """
    columns = np.stack([reading.excess(), *(reading.bounds() or ())])
    frozen = rule.frozen(reading)
    rows = columns.shape[1]
    if label >= rows:
        raise MalformedAnswer(f"the server wrote token {label}, which its tokenizer does not have")
    ids, logprobs = top.ids, top.logprobs
    real = ids < rows
    if top.complete and real.any() and rule.filter > 0:
        inside = logprobs >= logprobs[real][0] + np.log(rule.filter)
        ids, logprobs, real = ids[inside], logprobs[inside], real[inside]
    known = np.sort(ids[real])
    outside = unreported(ids, rows)
    kept, more = known, np.empty((len(columns), 0))
    tail = np.empty(0)
    if not top.complete and known.size < rows:
        if frozen is None:
            more = columns[:, outside].max(1, keepdims=True) if rule.method == "offset" else columns[:, outside].min(1, keepdims=True)
        else:
            others = outside & (np.arange(rows) != label)
            kept = np.concatenate([known, _unbeaten(np.flatnonzero(others), columns[0], frozen)])
            tail = _rest(frozen[others], frozen[kept[known.size :]])
            more = np.full((len(columns), tail.size), _NEVER)
    if outside[label]:
        kept = np.append(kept, label)
    values = np.concatenate([columns[:, kept], more], 1)
    named = {int(token): place for place, token in enumerate(kept)}
    places = np.empty(ids.size, dtype=np.int64)
    places[real] = np.searchsorted(known, ids[real])
    places[~real] = values.shape[1] + np.arange(int((~real).sum()))  # padding stays beyond the vocabulary, where it is dropped
    ends = (values[1], values[2]) if len(values) > 1 else None
    told = None if frozen is None else np.append(frozen[kept], tail)
    small = KeptReading(reading.peak, reading.gate, values[0], ends, told)
    return Position(named[label], logprob, named.get(own, -1), TopLogprobs(places, logprobs, top.complete), small)


def _unbeaten(ids: Int[np.ndarray, " ids"], change: Float[np.ndarray, " rows"], frozen: Float[np.ndarray, " rows"]) -> np.ndarray:
    """The tokens of which no other has both a larger p_o and a larger change: the only ones that can come first after a shift."""
    order = ids[np.lexsort((-change[ids], -frozen[ids]))]
    highest = np.maximum.accumulate(change[order])
    return np.sort(order[np.append(True, highest[1:] > highest[:-1])]) if order.size else order


def _rest(every: Float[np.ndarray, " outside"], kept: Float[np.ndarray, " kept"]) -> Float[np.ndarray, " shares"]:
    """Log p_o of the tokens outside K that are not kept, in equal shares none of which is larger than the largest token."""
    mass = float(np.exp(every).sum() - np.exp(kept).sum())
    if kept.size == every.size or mass <= 0:
        return np.empty(0)
    shares = int(np.ceil(mass / np.exp(kept.max())))
    return np.full(shares, np.log(mass / shares))
