"""Several LoRA adapters of one base in one pass: a batch in parts, a part an adapter, one of which may be the bare base."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uld_offset_models.thin import ThinLinear

Delta = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank), already scaled


@dataclass
class Parts:
    """How many rows of the next batch belong to each of so many `adapters`, in their order; None: the same number to each."""

    adapters: int
    counts: Sequence[int] | None = None


class BatchedLora(ThinLinear):
    """A linear layer y = W x + b, to whose i-th part of the batch deltas[i] adds B A x (None: nothing).

    All A and all B lie in one tensor each, those of a lower rank filled up with zeros: equal parts take two products in all.
    """

    down: Float[Tensor, "adapters width rank"]
    up: Float[Tensor, "adapters rank rows"]

    def __init__(self, weight: Tensor, bias: Tensor | None, deltas: Sequence[Delta | None], parts: Parts) -> None:
        super().__init__(weight, bias)
        self.parts = parts
        rows, width = weight.shape
        nothing = (weight.new_zeros(1, width), weight.new_zeros(rows, 1))
        downs, ups = zip(*(delta or nothing for delta in deltas), strict=True)
        self.register_buffer("down", pad_sequence([a.detach() for a in downs], batch_first=True).transpose(1, 2).contiguous())
        self.register_buffer("up", pad_sequence([b.detach().T for b in ups], batch_first=True).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; raises `ValueError` for a batch that is not divided by its parts."""
        out = super().forward(x)
        adapters = self.parts.adapters
        counts = self.parts.counts or [len(x) // adapters] * adapters
        if sum(counts) != len(x):
            raise ValueError(f"a batch of {len(x)} rows is not divided by {counts}")
        if len(set(counts)) == 1:
            mine = x.reshape(adapters, -1, x.shape[-1])
            return torch.baddbmm(out.reshape(adapters, -1, out.shape[-1]), mine @ self.down, self.up).reshape(out.shape)
        return torch.cat(
            [
                out[end - count : end] + x[end - count : end] @ down @ up
                for count, end, down, up in zip(counts, accumulate(counts), self.down, self.up, strict=True)
            ]
        )


def split_batch(adapter: Any, names: Sequence[str | None]) -> tuple[Any, Parts]:
    """The base of a peft model with its LoRA layers made to run one part of a batch with each of the named adapters (None: without)."""
    from peft.tuners.lora import LoraLayer

    base, parts = adapter.get_base_model(), Parts(len(names))
    for place, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            owner, _, name = place.rpartition(".")
            inner = module.get_base_layer()
            setattr(
                base.get_submodule(owner), name, BatchedLora(inner.weight, inner.bias, [_delta(module, which) for which in names], parts)
            )
    return base, parts


def _delta(module: Any, name: str | None) -> Delta | None:
    if name is None or name not in module.lora_A:
        return None
    return module.lora_A[name].weight, module.lora_B[name].weight * module.scaling[name]
