"""Linear layers for a few positions at a time, which is what reading along an answer asks for."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_FEW, _FEW_ENOUGH = 4, 2  # positions; the second where the layer narrows


def thin_linear(x: Float[Tensor, "*batch width"], weight: Float[Tensor, "rows width"]) -> Float[Tensor, "*batch rows"]:
    """W x at each position; as W X for few of them on a CPU, which reads W at the memory's speed then, as X W^T two to five times slower.

    A single position counts as two: the product with one column is the slow one again.
    """
    flat = x.reshape(-1, x.shape[-1])
    count = len(flat)
    if x.device.type != "cpu" or count > (_FEW if len(weight) >= weight.shape[1] else _FEW_ENOUGH):
        return functional.linear(x, weight)
    columns = (flat if count > 1 else flat.repeat(2, 1)).T
    return (weight @ columns).T[:count].reshape(*x.shape[:-1], len(weight))


class ThinLinear(torch.nn.Module):
    """A linear layer y = W x + b by `thin_linear`, for inference."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        out = thin_linear(x, self.weight)
        return out if self.bias is None else out + self.bias


def thinned(model: Any) -> Any:
    """The transformers model with a `ThinLinear` in the place of every linear layer but its head."""
    head = model.get_output_embeddings()
    for place, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            owner, _, name = place.rpartition(".")
            setattr(model.get_submodule(owner), name, ThinLinear(module.weight, module.bias))
    return model
