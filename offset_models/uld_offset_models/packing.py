"""Rows laid end to end without padding, a prompt beginning they share stored once, and the attention that keeps them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from uld_adapters.errors import UsageError
from uld_offset_models.encoding import Encoded

PACKED = "uld_packed"
_WORTH_SHARING = 8  # tokens


@dataclass(frozen=True)
class Layout:
    """Where rows lie in the pack: `shared` tokens first, seen by every row, then `lengths` tokens of each row.

    Rows that are trees have `masks`, True where a token (first index) sees another of its row.
    """

    shared: int
    lengths: tuple[int, ...]
    masks: tuple[Bool[Tensor, "tokens tokens"], ...] = ()


@dataclass(frozen=True)
class Pack:
    """One training step as a single sequence.

    `at` are the positions that predict an answer token, `labels` those tokens; the first `forget` of them belong to forget rows.
    `totals` are the answer tokens (forget, retain) of the step over all processes.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    at: Int[Tensor, " answers"]
    labels: Int[Tensor, " answers"]
    forget: int
    layout: Layout
    rows: tuple[int, ...]  # answer tokens of each row, in order
    totals: tuple[int, int]


def pack(forget: Sequence[Encoded], retain: Sequence[Encoded], *, totals: tuple[int, int] | None = None) -> Pack:
    """Lay the rows end to end, forget rows first; the longest common beginning that no answer is predicted from is stored once."""
    rows = [*forget, *retain]
    shared = _common(rows)
    ids, positions = list(rows[0].ids[:shared]), list(range(shared))
    at: list[int] = []
    labels: list[int] = []
    for row in rows:
        # the last token predicts nothing, so it is not run
        first = len(ids) - shared
        at.extend(range(first + row.start - 1, first + len(row.ids) - 1))
        labels.extend(row.ids[row.start :])
        ids.extend(row.ids[shared:-1])
        positions.extend(range(shared, len(row.ids) - 1))
    counts = tuple(len(row.ids) - row.start for row in rows)
    mine = (sum(counts[: len(forget)]), sum(counts[len(forget) :]))
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        at=torch.tensor(at),
        labels=torch.tensor(labels),
        forget=mine[0],
        layout=Layout(shared, tuple(len(row.ids) - 1 - shared for row in rows)),
        rows=counts,
        totals=totals or mine,
    )


def _common(rows: Sequence[Encoded]) -> int:
    limit = min(row.start for row in rows) - 1
    if len(rows) < 2 or limit < _WORTH_SHARING:
        return 0
    low, high = min(row.ids[:limit] for row in rows), max(row.ids[:limit] for row in rows)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b), limit)
    return same if same >= _WORTH_SHARING else 0


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 groups tokens width"],
    value: Float[Tensor, "1 groups tokens width"],
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Float[Tensor, "1 tokens heads width"], None]:
    """Causal attention within each row, and of each row to the shared beginning: equal to running every row alone."""
    for name in ("softcap", "s_aux", "position_bias"):
        if unused.get(name) is not None:
            raise UsageError(f"the base's attention uses {name}, which packed training does not know", hint="choose another base")
    attend = torch.nn.functional.scaled_dot_product_attention
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sizes = [layout.shared, *layout.lengths]
    queries, keys, values = (torch.split(t, sizes, 2) for t in (query, key, value))
    parts = []
    if layout.shared:
        mask = causal_mask(layout.shared, layout.shared, sliding_window, query.device)
        parts.append(attend(queries[0], keys[0], values[0], attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling))
    for row, (q, k, v) in enumerate(zip(queries[1:], keys[1:], values[1:], strict=True)):
        if layout.shared:
            k, v = torch.cat((keys[0], k), 2), torch.cat((values[0], v), 2)
        if layout.masks:
            mask = functional.pad(layout.masks[row].to(query.device), (layout.shared, 0), value=True)
        else:
            mask = causal_mask(q.shape[2], k.shape[2], sliding_window, query.device)
        parts.append(attend(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look, the queries being the last of the keys; None where plain causality says it all."""
    if queries == keys and (window is None or keys <= window):
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def use_packed_attention(model: Any) -> None:
    """Make a transformers model run packed rows; raises `UsageError` for layers that mix neighbouring rows (state spaces, convolutions)."""
    from transformers import AttentionInterface

    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UsageError(
            f"the base has layers of kind {', '.join(sorted(kinds))}, which cannot run packed rows", hint="choose another base"
        )
    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)
