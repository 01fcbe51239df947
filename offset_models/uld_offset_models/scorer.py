"""The small model reads along: new tokens in, one reading a position out, with key-value caches that roll back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uld_adapters.errors import AssistantFailed
from uld_offset_models.assistant import SmallModel
from uld_offset_models.batch_reading import Pending, read_batch
from uld_offset_models.running import Running, holds_state
from uld_offset_models.thin import thin_linear
from uld_offset_models.track import Track


@dataclass(frozen=True)
class Reading:
    """What the small model thinks at one prefix.

    `peak` is the largest excess log p_a(y|x) - log u over the whole vocabulary in nats, or an upper bound of it where that
    already proves the position untouched. `gate` is c(x), None for an assistant without one.
    """

    peak: float
    gate: float | None
    hidden: Float[Tensor, " hidden"]
    scorer: "Scorer"
    row: Float[Tensor, " rows"] | None = None

    def bounds(self) -> None:
        """The values are exact."""

    def excess(self) -> Float[np.ndarray, " rows"]:
        """Log p_a(y|x) - log u(y) in nats for every real row of the vocabulary; the row that gave the peak, where one did."""
        row = self.row
        if row is None:
            logits = self.scorer.head(self.hidden[None])
            row = self.scorer.excess(logits, None if self.gate is None else logits.new_tensor([self.gate]))[0]
        return row.double().cpu().numpy()


class Scorer:
    """Runs a small model over new tokens of many texts at once; `threshold` (nats) is where a position counts as touched.

    Most positions of a gated assistant are settled without its output head:
    max_y log p_a(y|x) - log u <= c * ||h|| * max_y ||W_y - mean W||, for logsumexp(l) >= mean(l) + ln|B|.
    """

    def __init__(self, model: SmallModel, *, threshold: float = 0.0) -> None:
        self.model = model
        self.threshold = threshold
        self.rows = int(model.head.shape[0])
        self._mean = model.head.mean(0)
        self.radius = float((model.head - self._mean).norm(dim=1).max())
        self._running = Running(model.backbone, model.parts) if holds_state(model.backbone.config) else None

    @property
    def models(self) -> tuple[SmallModel]:
        """The model that reads the text of a track."""
        return (self.model,)

    @torch.inference_mode()
    def head(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n rows"]:
        """W h, without the gate."""
        return thin_linear(hidden, self.model.head).float()

    @torch.inference_mode()
    def excess(self, logits: Float[Tensor, "n rows"], gate: Float[Tensor, " n"] | None) -> Float[Tensor, "n rows"]:
        """Log p_a - log u in nats from W h: log_softmax(c * W h) + ln|B|."""
        return torch.log_softmax(logits if gate is None else logits * gate[:, None], -1) + math.log(self.rows)

    def read(self, jobs: Sequence[tuple[Track, Sequence[int]]], *, every: bool = True) -> list[list[Reading]]:
        """Feed each track its new tokens in one batched pass; one Reading after each new token (only the last: every=False)."""
        return read_batch([self], jobs, every=every)

    def texts(self, track: Track) -> list[Track]:
        """The texts that go through the backbone for a track."""
        return [track]

    def pending(self, states: Sequence[Float[Tensor, "n hidden"]]) -> Pending:
        """Positions to be read, from the final hidden states of each of `texts`."""
        (hidden,) = states
        gate = None if self.model.gate is None else self.model.gate(hidden)
        limit = hidden.float().norm(dim=1) * self.radius
        peaks = limit if gate is None else limit * gate
        open_at = torch.nonzero(peaks > self.threshold).flatten()

        def finish(logits: Float[Tensor, "open rows"]) -> list[Reading]:
            rows: list[Tensor | None] = [None] * len(hidden)
            settled = peaks
            if open_at.numel():
                excess = self.excess(logits, None if gate is None else gate[open_at])
                settled = peaks.index_copy(0, open_at, excess.max(-1).values)
                for at, row in zip(open_at.tolist(), excess, strict=True):
                    rows[at] = row
            if not torch.isfinite(settled).all():
                raise AssistantFailed("the assistant's values are not finite", hint="train it again, or load it in another dtype")
            gates: list[float | None] = [None] * len(hidden) if gate is None else gate.tolist()
            return [Reading(peak, c, h, self, row) for peak, c, h, row in zip(settled.tolist(), gates, hidden, rows, strict=True)]

        return Pending(hidden[open_at], finish)

    def track(self) -> Track:
        """A text of which nothing has been read."""
        return Track(adapter=self.model.adapter)

    def forward(self, jobs: list[tuple[Track, list[int]]]) -> list[Float[Tensor, "tokens hidden"]]:
        """Feed each track its new tokens in one pass, texts of one adapter side by side; final hidden states, padded on the right.

        A model that holds a running state reads one text after another.
        """
        if self._running is not None:
            return [self._running.go_on(track, new)[0] for track, new in jobs]
        if self.model.parts is None:
            return list(self._forward(jobs))
        order = sorted(range(len(jobs)), key=lambda at: jobs[at][0].adapter)
        owners = [jobs[at][0].adapter for at in order]
        self.model.parts.counts = [owners.count(adapter) for adapter in range(self.model.parts.adapters)]
        states = dict(zip(order, self._forward([jobs[at] for at in order]), strict=True))
        return [states[at] for at in range(len(jobs))]

    def _forward(self, jobs: list[tuple[Track, list[int]]]) -> Float[Tensor, "batch tokens hidden"]:
        from transformers import DynamicCache

        device = self.model.head.device
        past = max(track.past for track, _ in jobs)
        width = max(len(new) for _, new in jobs)
        even = all(track.past == past and len(new) == width for track, new in jobs)
        ids = torch.zeros((len(jobs), width), dtype=torch.long)
        where = torch.zeros((len(jobs), width), dtype=torch.long)
        seen = torch.zeros((len(jobs), past + width), dtype=torch.long)
        for row, (track, new) in enumerate(jobs):
            ids[row, : len(new)] = torch.tensor(new)
            where[row] = torch.arange(track.past, track.past + width)
            seen[row, : track.past] = 1
            seen[row, past : past + len(new)] = 1
        cache = DynamicCache()
        if past:
            for layer in range(len(jobs[0][0].layers) or len(max((t for t, _ in jobs), key=lambda t: len(t.layers)).layers)):
                cache.update(*self._stack([track for track, _ in jobs], layer, past), layer)
        # Caches of unequal length are padded on the right; the mask hides the padding and positions stay each text's own.
        out = self.model.backbone(
            input_ids=ids.to(device),
            attention_mask=None if even else seen.to(device),
            position_ids=where.to(device),
            past_key_values=cache,
            use_cache=True,
        )
        for row, (track, new) in enumerate(jobs):
            track.layers = [self._take(kv, row, track.past, past, len(new)) for kv in cache.layers]
            track.tokens = [*track.tokens, *new]
        return out.last_hidden_state.float() if self.model.head.dtype == torch.float32 else out.last_hidden_state

    def _stack(self, tracks: list[Track], layer: int, past: int) -> tuple[Tensor, Tensor]:
        if len(tracks) == 1:
            keys, values = tracks[0].layers[layer]
            return keys[None], values[None]
        shape = next(track.layers[layer][0] for track in tracks if track.layers)
        stacked = []
        for part in (0, 1):
            rows = shape.new_zeros((len(tracks), shape.shape[0], past, shape.shape[2]))
            for row, track in enumerate(tracks):
                if track.layers:
                    rows[row, :, : track.past] = track.layers[layer][part]
            stacked.append(rows)
        return stacked[0], stacked[1]

    def _take(self, kv: Any, row: int, old: int, past: int, new: int) -> tuple[Tensor, Tensor]:
        if old == past:
            return kv.keys[row, :, : past + new], kv.values[row, :, : past + new]
        parts = [torch.cat([t[row, :, :old], t[row, :, past : past + new]], 1) for t in (kv.keys, kv.values)]
        return parts[0], parts[1]
