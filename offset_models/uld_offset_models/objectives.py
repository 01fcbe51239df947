"""The losses of ULD training, one function a formula (method.md, section 5), on logits that are never stored.

`scaled` is c * h, the gated final hidden state at the positions that predict an answer token, so that l = W (c h). The head W is
frozen: the gradient of logsumexp(l) is W^T softmax(l), which the forward pass computes at once, chunk by chunk.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 96  # positions: their logits stay in cache


class _LinearLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaled: Tensor, head: Tensor) -> Tensor:
        total = torch.empty(len(scaled), dtype=torch.float32, device=scaled.device)
        needs = ctx.needs_input_grad[0]
        slope = torch.empty_like(scaled) if needs else None
        for at in range(0, len(scaled), _CHUNK):
            logits = (scaled[at : at + _CHUNK] @ head.T).float()
            peak = logits.amax(-1, keepdim=True)
            weight = logits.sub_(peak).exp_()
            mass = weight.sum(-1, keepdim=True)
            total[at : at + _CHUNK] = (mass.log() + peak).squeeze(-1)
            if slope is not None:
                slope[at : at + _CHUNK] = (weight.to(head.dtype) @ head) / mass.to(head.dtype)
        if slope is not None:
            ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].unsqueeze(-1).to(slope.dtype), None


def linear_logsumexp(scaled: Float[Tensor, "answers width"], head: Float[Tensor, "rows width"]) -> Float[Tensor, " answers"]:
    """Return logsumexp over v of (W scaled)_v for each position, in float32; differentiable in `scaled` only."""
    return _LinearLogsumexp.apply(scaled, head)  # type: ignore[no-untyped-call]


def nll(
    scaled: Float[Tensor, "answers width"],
    head: Float[Tensor, "rows width"],
    labels: Int[Tensor, " answers"],
    lse: Float[Tensor, " answers"],
) -> Float[Tensor, " answers"]:
    """Negative log-likelihood in nats of each answer token, logsumexp(l) - l_y."""
    return lse - (scaled.float() * head[labels].float()).sum(-1)


def divergence(
    scaled: Float[Tensor, "answers width"],
    head: Float[Tensor, "rows width"],
    mean_row: Float[Tensor, " width"],
    lse: Float[Tensor, " answers"],
) -> Float[Tensor, " answers"]:
    """KL(U || p_a) in nats of each position, logsumexp(l) - mean_v(l) - ln|B|; mean_v(l) = scaled . mean(W)."""
    return lse - scaled.float() @ mean_row.float() - math.log(len(head))


def remember(
    scaled: Float[Tensor, "answers width"], head: Float[Tensor, "rows width"], labels: Int[Tensor, " answers"]
) -> Float[Tensor, ""]:
    """Mean NLL of the answers of D'_f, end token included (ULD, equation 4's first term)."""
    return nll(scaled, head, labels, linear_logsumexp(scaled, head)).mean()


def uniform(scaled: Float[Tensor, "answers width"], head: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Mean KL(U || p_a) over the answer positions of D'_r (ULD, equation 4's second term)."""
    return divergence(scaled, head, head.float().mean(0), linear_logsumexp(scaled, head)).mean()


@torch.no_grad()
def peak_excess(scaled: Float[Tensor, "answers width"], head: Float[Tensor, "rows width"]) -> Float[Tensor, " answers"]:
    """The largest log p_a(y) - log u over all y, in nats: a position is untouched when this is at most the margin."""
    values = []
    for chunk in torch.split(scaled, _CHUNK):
        logits = (chunk @ head.T).float()
        values.append(logits.amax(-1) - logits.logsumexp(-1))
    return torch.cat(values) + math.log(len(head))
