"""A pair reads along: o' and o in one batched pass, each with its own key-value caches, one reading a position out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uld_adapters.errors import AssistantFailed
from uld_offset_models.pair import Pair
from uld_offset_models.scorer import Scorer, Track, head_logits

_ANY = 1e30  # nats; finite, for a gate of 0 makes 0 of it


@dataclass
class PairTrack:
    """One text as both models have read it."""

    tuned: Track = field(default_factory=Track)
    frozen: Track = field(default_factory=Track)

    @property
    def tokens(self) -> list[int]:
        """The ids that have been read."""
        return self.tuned.tokens

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.tuned.rollback(length)
        self.frozen.rollback(length)


@dataclass(frozen=True)
class PairReading:
    """What a pair thinks at one prefix.

    `peak` is the largest c |log p_o'(y|x) - log p_o(y|x)| over the whole vocabulary in nats, or an upper bound of it where that
    already proves the position untouched. `gate` is c(x), None for a pair without one; `hidden` are the states of o' and o.
    """

    peak: float
    gate: float | None
    hidden: Float[Tensor, "2 width"]
    scorer: "PairScorer"
    rows: Float[Tensor, "2 rows"] | None = None

    def excess(self) -> Float[np.ndarray, " rows"]:
        """The change d = c (log p_o'(y|x) - log p_o(y|x)) in nats for every real row of the vocabulary."""
        tuned, frozen = self._logprobs()
        return (1.0 if self.gate is None else self.gate) * (tuned - frozen)

    def frozen(self) -> Float[np.ndarray, " rows"]:
        """Log p_o(y|x) in nats for every real row of the vocabulary."""
        return self._logprobs()[1]

    def _logprobs(self) -> Float[np.ndarray, "2 rows"]:
        rows = self.scorer.logprobs(self.hidden[:1], self.hidden[1:])[:, 0] if self.rows is None else self.rows
        return rows.double().cpu().numpy()


class PairScorer:
    """Runs a pair over new tokens of many texts at once; `threshold` (nats) is where a position counts as touched.

    Most positions of a gated pair are settled without its output head: d = W (h' - h) - log E_o exp(W (h' - h)), and the second
    term lies between the least and the largest of the first, so that |d| <= 2 ||h' - h|| max_y ||W_y - mean W||.
    """

    def __init__(self, pair: Pair, *, threshold: float = 0.0) -> None:
        self.pair, self.threshold = pair, threshold
        self._tuned, self._frozen = Scorer(pair.tuned), Scorer(pair.frozen)

    def track(self) -> PairTrack:
        """A text of which nothing has been read."""
        prompt = self.pair.prompt
        return PairTrack(Track(layers=list(prompt), virtual=prompt[0][0].shape[1] if prompt else 0))

    @torch.inference_mode()
    def read(self, jobs: Sequence[tuple[PairTrack, Sequence[int]]], *, every: bool = True) -> list[list[PairReading]]:
        """Feed each track its new tokens in one batched pass; one reading after each new token (only the last: every=False)."""
        feed = [(track, list(new)) for track, new in jobs]
        tuned, frozen = ([(getattr(track, side), new) for track, new in feed] for side in ("tuned", "frozen"))
        if self.pair.shared:
            both = self._tuned.forward([*tuned, *frozen])
            first, second = both[: len(feed)], both[len(feed) :]
        else:
            first, second = self._tuned.forward(tuned), self._frozen.forward(frozen)
        readings = []
        for mine, theirs, (_, new) in zip(first, second, feed, strict=True):
            wanted = slice(0 if every else len(new) - 1, len(new))
            readings.append(self._readings(mine[wanted], theirs[wanted]))
        return readings

    @torch.inference_mode()
    def logprobs(self, tuned: Float[Tensor, "n width"], frozen: Float[Tensor, "n width"]) -> Float[Tensor, "2 n rows"]:
        """Log p_o' and log p_o in nats of hidden states."""
        if self.pair.one_head:
            logits = head_logits(self.pair.tuned.head, torch.cat([tuned, frozen])).view(2, len(tuned), -1)
        else:
            logits = torch.stack([head_logits(self.pair.tuned.head, tuned), head_logits(self.pair.frozen.head, frozen)])
        return torch.log_softmax(logits.float(), -1)

    def _readings(self, tuned: Float[Tensor, "n width"], frozen: Float[Tensor, "n width"]) -> list[PairReading]:
        gate = None if self.pair.tuned.gate is None else self.pair.tuned.gate(tuned).float()
        peaks = self._limits(tuned, frozen)
        peaks = peaks if gate is None else peaks * gate
        open_at = torch.nonzero(peaks > self.threshold).flatten()
        rows: list[Tensor | None] = [None] * len(tuned)
        if open_at.numel():
            found = self.logprobs(tuned[open_at], frozen[open_at])
            largest = (found[0] - found[1]).abs().amax(-1)
            peaks = peaks.index_copy(0, open_at, largest if gate is None else largest * gate[open_at])
            for at, row in zip(open_at.tolist(), found.unbind(1), strict=True):
                rows[at] = row
        if not torch.isfinite(peaks).all():
            raise AssistantFailed("the pair's values are not finite", hint="train it again, or load it in another dtype")
        gates: list[float | None] = [None] * len(tuned) if gate is None else gate.tolist()
        both = torch.stack([tuned, frozen], 1)
        return [PairReading(peak, c, h, self, row) for peak, c, h, row in zip(peaks.tolist(), gates, both, rows, strict=True)]

    def _limits(self, tuned: Float[Tensor, "n width"], frozen: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """No |d| without the gate is larger; where the two heads are not one nothing is known before they have been run."""
        if not self.pair.one_head:
            return torch.full((len(tuned),), _ANY, device=tuned.device)
        return 2 * self._tuned.radius * (tuned.float() - frozen.float()).norm(dim=1)
