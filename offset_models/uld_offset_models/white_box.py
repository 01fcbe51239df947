"""The target itself as a trainable module, by LoRA or in all its weights: the white-box baselines of ULD (arXiv 2406.08607, table 1)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import Goal
from uld_offset_models.lessons import Lesson, Reference
from uld_offset_models.preferences import answer_logprobs, forget_loss, nll, retain_loss, token_logprobs
from uld_offset_models.tuned import Tuned, make_trainable, packs


class GoalLosses(NamedTuple):
    """Losses of one step in nats, named in the goal: of the forget rows and of the retain rows."""

    forget: Float[Tensor, ""]
    retain: Float[Tensor, ""]


class WhiteBox(Tuned):
    """A causal model that is tuned towards a goal."""

    first_head: Tensor | None

    def __init__(self, model: Any, tokenizer: Any, *, goal: Goal, beta: float, trainable: str, autocast: bool) -> None:
        super().__init__(model, tokenizer, trainable=trainable, autocast=autocast)
        self.goal, self.beta = goal, beta
        # A frozen copy of the head turns the reference's hidden states into its logits; LoRA leaves the head as it is.
        copied = goal.retain == "kl" and trainable == "full"
        self.register_buffer("first_head", self.head.detach().clone() if copied else None, persistent=False)

    def forward(self, lesson: Lesson) -> GoalLosses:
        """Both losses; with several processes each gives its share of the step's means."""
        step, split = lesson.pack, lesson.pack.forget
        logits = self.logits(self.hidden(step))
        labels = step.labels.to(logits.device)
        reference = None if lesson.reference is None else lesson.reference.to(logits.device)
        before = None
        if lesson.states is not None:
            with torch.no_grad():
                before = self.logits(lesson.states.to(logits.device), head=self.first_head)
        token = token_logprobs(logits[:split], labels[:split])
        forget = forget_loss(self.goal.forget, token, step.rows[: lesson.forget_rows], reference, beta=self.beta)
        retain = retain_loss(self.goal.retain, logits[split:], labels[split:], before)
        return GoalLosses(forget * lesson.shares[0], retain * lesson.shares[1])

    @torch.no_grad()
    def reference(self, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> Reference:
        """P_ref on these rows: the model with its adapter off; without one the model as it is, so ask before training."""
        answers: dict[Encoded, float] = {}
        with self.untuned():
            for rows, step in packs(forget if self.goal.by_sequence else ()):
                token = token_logprobs(self.logits(self.hidden(step)), step.labels.to(self.head.device))
                answers.update(zip(rows, answer_logprobs(token, step.rows).tolist(), strict=True))
            return Reference(answers, self.states(retain if self.goal.retain == "kl" else ()))

    @torch.no_grad()
    def mean_nll(self, rows: Sequence[Encoded]) -> float:
        """Mean NLL of the rows' answers, in nats a token."""
        losses = [
            (nll(token_logprobs(self.logits(self.hidden(step)), step.labels.to(self.head.device))).item(), len(step.labels))
            for _, step in packs(rows)
        ]
        return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def build_white_box(
    base: Any, tokenizer: Any, *, goal: Goal, beta: float, trainable: str, rank: int, lora_alpha: int, seed: int, autocast: bool
) -> WhiteBox:
    """Put a LoRA adapter on every linear layer of a loaded model, or with `trainable` "full" free all its weights."""
    device = base.get_output_embeddings().weight.device
    model = make_trainable(base, trainable=trainable, rank=rank, lora_alpha=lora_alpha, seed=seed)
    return WhiteBox(model, tokenizer, goal=goal, beta=beta, trainable=trainable, autocast=autocast).to(device)
