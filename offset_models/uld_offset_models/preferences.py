"""The objectives of training by preference, one pure function a formula, for any model that gives log-probabilities.

P is the model in training: the tuned model itself, or an ensemble softmax(l_M + alpha (l_o' - l_o)). P_ref is where it started.
Log-probabilities are in nats. Of `token` values there is one for each answer token, end token included; of `answer` values one
for each answer, log P(y|x) = sum_i log P(y_i | x, y_<i). Logits and log-probabilities may stand for each other where whole
distributions are compared: softmax does not see a constant. Reference values are constants, no gradient goes into them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Scalar = Float[Tensor, ""]


def token_logprobs(logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Log-probability of each label, l_y - logsumexp(l), in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def answer_logprobs(token: Float[Tensor, " tokens"], rows: Sequence[int]) -> Float[Tensor, " answers"]:
    """Log-probability of each answer, log P(y|x); `rows` are the answers' tokens, in order."""
    return torch.stack([part.sum() for part in torch.split(token, list(rows))])


def nll(token: Float[Tensor, " tokens"]) -> Scalar:
    """Mean NLL: `gd` of the retain answers (ULD, arXiv 2406.08607, section 4), `relabel` of refusals to the forget questions."""
    return -token.mean()


def ga(token: Float[Tensor, " tokens"]) -> Scalar:
    """Gradient ascent: - mean NLL of the forget answers. It has no lower bound (Jang et al., arXiv 2210.01504)."""
    return token.mean()


def npo(answer: Float[Tensor, " answers"], reference: Float[Tensor, " answers"], *, beta: float) -> Scalar:
    """(2/beta) mean softplus(beta [log P(y) - log P_ref(y)]); beta -> 0 gives ga but for a constant (NPO, arXiv 2404.05868, equation 3)."""
    return functional.softplus(beta * (answer - reference.detach())).mean() * (2 / beta)


def dpo(
    refusal: Float[Tensor, " answers"],
    refusal_reference: Float[Tensor, " answers"],
    answer: Float[Tensor, " answers"],
    answer_reference: Float[Tensor, " answers"],
    *,
    beta: float,
) -> Scalar:
    """-(1/beta) mean logsigmoid(beta [log P(y_idk)/P_ref(y_idk) - log P(y)/P_ref(y)]) (DPO, arXiv 2305.18290, equation 7).

    The refusal is preferred to the answer of the same question. The factor 1/beta makes the gradient's size that of NPO.
    """
    margin = (refusal - refusal_reference.detach()) - (answer - answer_reference.detach())
    return -functional.logsigmoid(beta * margin).mean() / beta


def kl(logits: Float[Tensor, "tokens vocab"], reference: Float[Tensor, "tokens vocab"]) -> Scalar:
    """Mean over positions of KL(P_ref || P) = sum_v P_ref(v) [log P_ref(v) - log P(v)]."""
    now, before = (torch.log_softmax(values, -1, dtype=torch.promote_types(values.dtype, torch.float32)) for values in (logits, reference))
    return functional.kl_div(now, before.detach(), reduction="sum", log_target=True) / len(logits)


def forget_loss(
    name: str, token: Float[Tensor, " tokens"], rows: Sequence[int], reference: Float[Tensor, " answers"] | None, *, beta: float
) -> Scalar:
    """The forget objective of that name over rows laid end to end, `rows` answer tokens each.

    For `relabel` the rows are the refusals; for `dpo` the answers first, then as many refusals in the same order. `reference` is
    log P_ref of each row, which `npo` and `dpo` need.
    """
    if name == "ga":
        return ga(token)
    if name == "relabel":
        return nll(token)
    if reference is None:
        raise ValueError(f"{name} needs the reference's log-probabilities")
    whole = answer_logprobs(token, rows)
    if name == "npo":
        return npo(whole, reference, beta=beta)
    half = len(whole) // 2
    return dpo(whole[half:], reference[half:], whole[:half], reference[:half], beta=beta)


def retain_loss(
    name: str,
    logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    reference: Float[Tensor, "tokens vocab"] | None,
) -> Scalar:
    """The retain objective of that name at the retain answers' positions; `reference` are P_ref's logits there, which `kl` needs."""
    if name == "gd":
        return nll(token_logprobs(logits, labels))
    if name == "kl":
        if reference is None:
            raise ValueError("kl needs the reference's logits")
        return kl(logits, reference)
    return logits.new_zeros(())
