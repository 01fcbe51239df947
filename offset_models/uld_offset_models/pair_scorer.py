"""A pair reads along: o' and o in one batched pass, each with its own key-value caches, one reading a position out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uld_adapters.errors import AssistantFailed
from uld_offset_models.assistant import SmallModel
from uld_offset_models.batch_reading import Pending, read_batch
from uld_offset_models.pair import Pair
from uld_offset_models.scorer import Scorer
from uld_offset_models.track import Track

_ANY = 1e30  # nats; finite, for a gate of 0 makes 0 of it


@dataclass
class PairTrack:
    """One text as both models have read it; `member` is the place of the pair in a `GroupScorer`."""

    tuned: Track
    frozen: Track
    member: int = 0

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

    def bounds(self) -> None:
        """The values are exact."""

    def excess(self) -> Float[np.ndarray, " rows"]:
        """The change d = c (log p_o'(y|x) - log p_o(y|x)) in nats for every real row of the vocabulary."""
        tuned, frozen = self.logprobs()
        return (1.0 if self.gate is None else self.gate) * (tuned - frozen)

    def frozen(self) -> Float[np.ndarray, " rows"]:
        """Log p_o(y|x) in nats for every real row of the vocabulary."""
        return self.logprobs()[1]

    def logprobs(self) -> Float[np.ndarray, "2 rows"]:
        """Log p_o' and log p_o in nats for every real row of the vocabulary."""
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

    @property
    def models(self) -> tuple[SmallModel, SmallModel]:
        """The models that read the texts of a track."""
        return self.pair.tuned, self.pair.frozen

    def track(self) -> PairTrack:
        """A text of which nothing has been read."""
        prompt, tuned, frozen = self.pair.prompt, self._tuned.track(), self._frozen.track()
        tuned.layers, tuned.virtual = list(prompt), prompt[0][0].shape[1] if prompt else 0
        return PairTrack(tuned, frozen)

    def read(self, jobs: Sequence[tuple[PairTrack, Sequence[int]]], *, every: bool = True) -> list[list[PairReading]]:
        """Feed each track its new tokens in one batched pass; one reading after each new token (only the last: every=False)."""
        return read_batch([self], jobs, every=every)

    def texts(self, track: PairTrack) -> list[Track]:
        """The text as o' reads it, and as o does."""
        return [track.tuned, track.frozen]

    def forward(self, jobs: list[tuple[Track, list[int]]]) -> list[Float[Tensor, "tokens width"]]:
        """Feed each text its new tokens in one pass, or in one of each where o' and o are two models; final hidden states."""
        if self.pair.shared:
            return self._tuned.forward(jobs)
        both = zip(self._tuned.forward(jobs[0::2]), self._frozen.forward(jobs[1::2]), strict=True)
        return [states for pair in both for states in pair]

    def head(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n rows"]:
        """W h by the head of o'."""
        return self._tuned.head(hidden)

    @torch.inference_mode()
    def logprobs(self, tuned: Float[Tensor, "n width"], frozen: Float[Tensor, "n width"]) -> Float[Tensor, "2 n rows"]:
        """Log p_o' and log p_o in nats of hidden states."""
        return torch.log_softmax(torch.stack([self._tuned.head(tuned), self._frozen.head(frozen)]), -1)

    def pending(self, states: Sequence[Float[Tensor, "n width"]]) -> Pending:
        """Positions to be read, from the final hidden states of o' and of o."""
        tuned, frozen = states
        gate = None if self.pair.tuned.gate is None else self.pair.tuned.gate(tuned).float()
        peaks = self._limits(tuned, frozen)
        peaks = peaks if gate is None else peaks * gate
        open_at = torch.nonzero(peaks > self.threshold).flatten()

        def finish(logits: Float[Tensor, "wanted rows"]) -> list[PairReading]:
            rows: list[Tensor | None] = [None] * len(tuned)
            settled = peaks
            if open_at.numel():
                if self.pair.one_head:
                    found = torch.log_softmax(torch.stack(logits.chunk(2)), -1)
                else:
                    found = self.logprobs(tuned[open_at], frozen[open_at])
                largest = (found[0] - found[1]).abs().amax(-1)
                settled = peaks.index_copy(0, open_at, largest if gate is None else largest * gate[open_at])
                for at, row in zip(open_at.tolist(), found.unbind(1), strict=True):
                    rows[at] = row
            if not torch.isfinite(settled).all():
                raise AssistantFailed("the pair's values are not finite", hint="train it again, or load it in another dtype")
            gates: list[float | None] = [None] * len(tuned) if gate is None else gate.tolist()
            both = torch.stack([tuned, frozen], 1)
            return [PairReading(peak, c, h, self, row) for peak, c, h, row in zip(settled.tolist(), gates, both, rows, strict=True)]

        wanted = torch.cat([tuned[open_at], frozen[open_at]]) if self.pair.one_head else tuned[:0]
        return Pending(wanted, finish)

    def _limits(self, tuned: Float[Tensor, "n width"], frozen: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """No |d| without the gate is larger; where the two heads are not one nothing is known before they have been run."""
        if not self.pair.one_head:
            return torch.full((len(tuned),), _ANY, device=tuned.device)
        return 2 * self._tuned.radius * (tuned.float() - frozen.float()).norm(dim=1)
