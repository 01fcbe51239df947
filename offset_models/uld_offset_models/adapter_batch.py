"""Several LoRA adapters of one base in one pass: a batch in equal parts, a part an adapter, one of which may be the bare base."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Delta = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank), already scaled


class BatchedLora(torch.nn.Module):
    """A linear layer y = W x + b, to whose i-th part of the batch deltas[i] adds B A x (None: nothing)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, deltas: Sequence[Delta | None]) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight, requires_grad=False), bias
        self.count = len(deltas)
        for at, delta in enumerate(deltas):
            for name, value in zip("AB", delta or (None, None), strict=True):
                self.register_buffer(f"{name}{at}", None if value is None else value.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; the batch must be a multiple of the number of deltas."""
        out = functional.linear(x, self.weight, self.bias)
        size = len(x) // self.count
        for at in range(self.count):
            if (down := getattr(self, f"A{at}")) is not None:
                part = slice(at * size, (at + 1) * size)
                out[part] += functional.linear(functional.linear(x[part], down), getattr(self, f"B{at}"))
        return out


def split_batch(adapter: Any, names: Sequence[str | None]) -> Any:
    """The base of a peft model with its LoRA layers made to run one part of a batch with each of the named adapters (None: without)."""
    from peft.tuners.lora import LoraLayer

    base = adapter.get_base_model()
    for place, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            owner, _, name = place.rpartition(".")
            deltas = [None if which is None else _delta(module, which) for which in names]
            inner = module.get_base_layer()
            setattr(base.get_submodule(owner), name, BatchedLora(inner.weight.detach(), inner.bias, deltas))
    return base


def _delta(module: Any, name: str) -> Delta:
    return module.lora_A[name].weight, module.lora_B[name].weight * module.scaling[name]
