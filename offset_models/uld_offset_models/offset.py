"""Delta-unlearning (arXiv 2404.11045) in training: a pair of small models whose difference is added to the target's logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uld_offset_models.assistant import Gate
from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import Goal
from uld_offset_models.offset_lessons import OffsetLesson, OffsetLessons
from uld_offset_models.preferences import answer_logprobs, forget_loss, retain_loss, token_logprobs
from uld_offset_models.steps import Steps
from uld_offset_models.target_logits import Support
from uld_offset_models.target_side import TargetSide
from uld_offset_models.tuned import Tuned, packs
from uld_offset_models.white_box import GoalLosses

_CHUNK = 96  # positions at a time, where nothing but the largest value is wanted


def ensemble_logits(
    target: Float[Tensor, "tokens support"], change: Float[Tensor, "tokens support"], *, alpha: float
) -> Float[Tensor, "tokens support"]:
    """Return l_M + alpha * d (arXiv 2404.11045, equation 3), d = c (l_o' - l_o); with d = 0 the target itself."""
    return target + alpha * change


class OffsetPair(Tuned):
    """o' in training beside the frozen o; the losses are those of the ensemble softmax(l_M + alpha c (l_o' - l_o)).

    `states` are o's final hidden states (tokens, width) of every row, `first_head` (rows, width) is its head where that is another
    than the one of o'. The gate c, our own, reads the hidden states of o'; without one c = 1.
    """

    first_head: Tensor | None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        goal: Goal,
        beta: float,
        alpha: float,
        gate: Gate | None,
        target: TargetSide,
        states: Mapping[Encoded, Tensor],
        trainable: str,
        autocast: bool,
        first_head: Tensor | None = None,
    ) -> None:
        super().__init__(model, tokenizer, trainable=trainable, autocast=autocast)
        self.goal, self.beta, self.alpha, self.gate, self.target, self.frozen_states = goal, beta, alpha, gate, target, states
        if first_head is None and trainable == "full":
            first_head = self.head.detach().clone()
        self.register_buffer("first_head", first_head, persistent=False)

    def change(
        self, hidden: Float[Tensor, "tokens width"], frozen: Float[Tensor, "tokens width"], ids: Int[Tensor, "tokens support"] | None = None
    ) -> Float[Tensor, "tokens support"]:
        """The change c (l_o' - l_o) up to a constant a position, over the vocabulary or some ids; from both models' hidden states."""
        gate = torch.ones_like(hidden[:, :1]) if self.gate is None else self.gate(hidden).unsqueeze(-1)
        if self.first_head is None:  # one head: c (W h' - W h) = W c (h' - h)
            return self._scores(gate * (hidden.float() - frozen.float()), self.head, ids)
        return gate * (self._scores(hidden, self.head, ids) - self._scores(frozen, self.first_head, ids))

    def forward(self, lesson: OffsetLesson) -> GoalLosses:
        """Both losses; with several processes each gives its share of the step's means."""
        step, split = lesson.pack, lesson.pack.forget
        (logits, _, columns), change = self.compared(lesson)
        before = answer_logprobs(token_logprobs(logits[:split], columns[:split]), step.rows[: lesson.forget_rows])
        now = ensemble_logits(logits, change, alpha=self.alpha)
        token = token_logprobs(now[:split], columns[:split])
        forget = forget_loss(self.goal.forget, token, step.rows[: lesson.forget_rows], before, beta=self.beta)
        retain = retain_loss(self.goal.retain, now[split:], columns[split:], logits[split:])
        return GoalLosses(forget * lesson.shares[0], retain * lesson.shares[1])

    def compared(self, lesson: OffsetLesson) -> tuple[Support, Float[Tensor, "tokens support"]]:
        """What the target says at the lesson's answer positions, a constant, and the change there."""
        if lesson.states is None:
            raise ValueError("a pair's lesson needs the frozen model's hidden states")
        hidden = self.hidden(lesson.pack)
        frozen, labels = lesson.states.to(hidden.device), lesson.pack.labels.to(hidden.device)
        with torch.no_grad():
            support = self.target.support(lesson.known, labels, lambda: self.frozen_logits(frozen))
        return support, self.change(hidden, frozen, support.ids)

    def lessons(self, steps: Steps, refusals: Mapping[Encoded, Encoded]) -> OffsetLessons:
        """The lessons of the steps."""
        return OffsetLessons(steps, self.goal, refusals, self.target, self.frozen_states)

    def frozen_logits(self, frozen: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """l_o of its hidden states."""
        return self.logits(frozen, head=self.first_head)

    @torch.no_grad()
    def untouched_share(self, rows: Sequence[Encoded], *, margin: float) -> float:
        """Share of rows with every answer position untouched: max over y of c |log p_o'(y) - log p_o(y)| at most `margin` nats."""
        untouched = 0
        for some, step in packs(rows):
            hidden = self.hidden(step)
            frozen = torch.cat([self.frozen_states[row] for row in some]).to(hidden.device)
            peaks = torch.cat([self._peaks(*part) for part in zip(torch.split(hidden, _CHUNK), torch.split(frozen, _CHUNK), strict=True)])
            untouched += sum(bool((peak <= margin).all()) for peak in torch.split(peaks, list(step.rows)))
        return untouched / len(rows)

    def _peaks(self, hidden: Float[Tensor, "tokens width"], frozen: Float[Tensor, "tokens width"]) -> Float[Tensor, " tokens"]:
        peaks = (self.logits(hidden).log_softmax(-1) - self.frozen_logits(frozen).log_softmax(-1)).abs().amax(-1)
        return peaks if self.gate is None else self.gate(hidden) * peaks

    def _scores(
        self, hidden: Float[Tensor, "tokens width"], head: Float[Tensor, "rows width"], ids: Int[Tensor, "tokens support"] | None
    ) -> Float[Tensor, "tokens support"]:
        if ids is None:
            return self.logits(hidden, head=head)
        return torch.einsum("td,tsd->ts", hidden.float(), head[ids].float())
