"""The losses of ULD training, one function a formula (arXiv 2406.08607, section 3, and its code), on logits that are never stored.

`scaled` is c * h, the gated final hidden state at the positions that predict an answer token, so that l = W (c h). The head W is
frozen: the gradient of logsumexp(l) is W^T softmax(l), which the forward pass computes at once, block by block of W.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 4096  # rows of the head: the logits of all positions for so many stay in cache
_CHUNK = 96  # positions, where only the largest logit is wanted


class _LinearLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaled: Tensor, head: Tensor) -> Tensor:
        # Like flash attention over the vocabulary: a running maximum, mass and slope, one block of rows at a time.
        peak = scaled.new_full((len(scaled), 1), -math.inf, dtype=torch.float32)
        mass = torch.zeros_like(peak)
        slope = scaled.new_zeros(scaled.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        buffer = scaled.new_empty(len(scaled) * min(_BLOCK, len(head)))
        for block in torch.split(head, _BLOCK):
            logits = torch.mm(scaled, block.T, out=buffer[: len(scaled) * len(block)].view(len(scaled), len(block))).float()
            higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
            shrink = (peak - higher).exp_()
            weight = logits.sub_(higher).exp_()
            mass.mul_(shrink).add_(weight.sum(-1, keepdim=True))
            if slope is not None:
                slope.mul_(shrink)
                if head.dtype == torch.float32:
                    slope.addmm_(weight, block)
                else:
                    slope.add_(weight.to(head.dtype) @ block)
            peak = higher
        total = (mass.log() + peak).squeeze(-1)
        if slope is not None:
            ctx.save_for_backward((slope / mass).to(scaled.dtype))
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
