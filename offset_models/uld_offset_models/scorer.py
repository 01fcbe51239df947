"""The small model reads along: new tokens in, one reading a position out, with key-value caches that roll back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from uld_adapters.errors import AssistantFailed
from uld_offset_models.assistant import SmallModel
from uld_offset_models.thin import thin_linear


@dataclass
class Track:
    """One text as a small model has read it: ids, and for each layer keys and values of shape (heads, tokens, head_dim).

    `member` says which of the scorer's models reads it.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    member: int = 0

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.tokens = self.tokens[:length]
        self.layers = [(keys[:, :length], values[:, :length]) for keys, values in self.layers]


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

    def excess(self) -> Float[np.ndarray, " rows"]:
        """Log p_a(y|x) - log u(y) in nats for every real row of the vocabulary; the row that gave the peak, where one did."""
        row = self.row
        if row is None:
            row = self.scorer.excess(self.hidden[None], None if self.gate is None else self.hidden.new_tensor([self.gate]).float())[0]
        return row.double().cpu().numpy()


class Scorer:
    """Runs a small model over new tokens of many texts at once; `threshold` (nats) is where a position counts as touched.

    `beside` are further models on the same backbone and head, each with its threshold: their texts go through in the same passes.
    Most positions of a gated assistant are settled without its output head:
    max_y log p_a(y|x) - log u <= c * ||h|| * max_y ||W_y - mean W||, for logsumexp(l) >= mean(l) + ln|B|.
    """

    def __init__(self, model: SmallModel, *, threshold: float = 0.0, beside: Sequence[tuple[SmallModel, float]] = ()) -> None:
        self.model = model
        self.members = (model, *(other for other, _ in beside))
        self._thresholds = torch.tensor([threshold, *(limit for _, limit in beside)])
        self.rows = int(model.head.shape[0])
        self._mean = model.head.mean(0)
        self._radius = float((model.head - self._mean).norm(dim=1).max())

    @torch.inference_mode()
    def excess(self, hidden: Float[Tensor, "n hidden"], gate: Float[Tensor, " n"] | None) -> Float[Tensor, "n rows"]:
        """Log p_a - log u in nats: log_softmax(c * W h) + ln|B|."""
        logits = thin_linear(hidden, self.model.head).float()
        if gate is not None:
            logits = logits * gate[:, None]
        return torch.log_softmax(logits, -1) + math.log(self.rows)

    @torch.inference_mode()
    def read(self, jobs: Sequence[tuple[Track, Sequence[int]]], *, every: bool = True) -> list[list[Reading]]:
        """Feed each track its new tokens in one batched pass; one Reading after each new token (only the last: every=False)."""
        order = sorted(range(len(jobs)), key=lambda at: jobs[at][0].member)
        feed = [(jobs[at][0], list(jobs[at][1])) for at in order]
        states = [row[0 if every else len(new) - 1 : len(new)] for row, (_, new) in zip(self._forward(feed), feed, strict=True)]
        owners = [track.member for (track, _), row in zip(feed, states, strict=True) for _ in row]
        found = iter(self._readings(torch.cat(states), torch.tensor(owners)))
        readings = {at: [next(found) for _ in row] for at, row in zip(order, states, strict=True)}
        return [readings[at] for at in range(len(jobs))]

    def _readings(self, hidden: Float[Tensor, "n hidden"], owners: Int[Tensor, " n"]) -> list[Reading]:
        gate = self._gates(hidden, owners)
        peaks = hidden.float().norm(dim=1) * self._radius * gate
        open_at = torch.nonzero(peaks > self._thresholds[owners].to(peaks)).flatten()
        rows: list[Tensor | None] = [None] * len(hidden)
        if open_at.numel():
            excess = self.excess(hidden[open_at], gate[open_at])
            peaks = peaks.index_copy(0, open_at, excess.max(-1).values)
            for at, row in zip(open_at.tolist(), excess, strict=True):
                rows[at] = row
        if not torch.isfinite(peaks).all():
            raise AssistantFailed("the assistant's values are not finite", hint="train it again, or load it in another dtype")
        gated = [self.members[owner].gate is not None for owner in owners.tolist()]
        gates = [c if known else None for c, known in zip(gate.tolist(), gated, strict=True)]
        return [Reading(peak, c, h, self, row) for peak, c, h, row in zip(peaks.tolist(), gates, hidden, rows, strict=True)]

    def _gates(self, hidden: Float[Tensor, "n hidden"], owners: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """c(x) at each position, 1 for a model without a gate."""
        gates = hidden.new_ones(len(hidden), dtype=torch.float32)
        for member, model in enumerate(self.members):
            if model.gate is not None:
                mine = (owners == member).to(hidden.device)
                gates[mine] = model.gate(hidden[mine]).float()
        return gates

    def _forward(self, jobs: list[tuple[Track, list[int]]]) -> Float[Tensor, "batch tokens hidden"]:
        from transformers import DynamicCache

        device = self.model.head.device
        past = max(len(track.tokens) for track, _ in jobs)
        width = max(len(new) for _, new in jobs)
        even = all(len(track.tokens) == past and len(new) == width for track, new in jobs)
        ids = torch.zeros((len(jobs), width), dtype=torch.long)
        where = torch.zeros((len(jobs), width), dtype=torch.long)
        seen = torch.zeros((len(jobs), past + width), dtype=torch.long)
        for row, (track, new) in enumerate(jobs):
            ids[row, : len(new)] = torch.tensor(new)
            where[row] = torch.arange(len(track.tokens), len(track.tokens) + width)
            seen[row, : len(track.tokens)] = 1
            seen[row, past : past + len(new)] = 1
        if self.model.parts is not None:
            self.model.parts.counts = [sum(track.member == member for track, _ in jobs) for member in range(len(self.members))]
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
            track.layers = [self._take(kv, row, len(track.tokens), past, len(new)) for kv in cache.layers]
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
                    rows[row, :, : len(track.tokens)] = track.layers[layer][part]
            stacked.append(rows)
        return stacked[0], stacked[1]

    def _take(self, kv: Any, row: int, old: int, past: int, new: int) -> tuple[Tensor, Tensor]:
        if old == past:
            return kv.keys[row, :, : past + new], kv.values[row, :, : past + new]
        parts = [torch.cat([t[row, :, :old], t[row, :, past : past + new]], 1) for t in (kv.keys, kv.values)]
        return parts[0], parts[1]
