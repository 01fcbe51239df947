"""The target itself as a trainable module, by LoRA or in all its weights: the white-box baselines of ULD (arXiv 2406.08607, table 1)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from uld_offset_models.assistant import real_rows
from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import Goal
from uld_offset_models.lessons import Lesson, Reference
from uld_offset_models.network import add_lora
from uld_offset_models.packing import Pack, pack, use_packed_attention
from uld_offset_models.preferences import answer_logprobs, forget_loss, nll, retain_loss, token_logprobs

_ROWS_AT_ONCE = 16


class GoalLosses(NamedTuple):
    """Losses of one step in nats, named in the goal: of the forget rows and of the retain rows."""

    forget: Float[Tensor, ""]
    retain: Float[Tensor, ""]


class WhiteBox(torch.nn.Module):
    """A causal model that is tuned towards a goal; `model` is a peft model with `lora`, else the transformers model itself.

    Logits are those of the real rows of the head. With `autocast` it computes in bfloat16, whatever type the weights are kept in.
    """

    first_head: Tensor | None

    def __init__(self, model: Any, tokenizer: Any, *, goal: Goal, beta: float, lora: bool, autocast: bool) -> None:
        super().__init__()
        self.model, self.goal, self.beta, self.lora, self.autocast = model, goal, beta, lora, autocast
        use_packed_attention(self.inner)
        self.vocabulary = len(real_rows(self.inner, tokenizer))
        # A frozen copy of the head turns the reference's hidden states into its logits; LoRA leaves the head as it is.
        copied = goal.retain == "kl" and not lora
        self.register_buffer("first_head", self.head.detach().clone() if copied else None, persistent=False)

    @property
    def inner(self) -> Any:
        """The transformers model."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def head(self) -> Tensor:
        """The real rows of the output embedding (rows, width)."""
        return self.inner.get_output_embeddings().weight[: self.vocabulary]

    def hidden(self, step: Pack) -> Float[Tensor, "tokens width"]:
        """Final hidden states at the positions that predict an answer token."""
        device = self.head.device
        with self._precision():
            out = self.inner.base_model(
                input_ids=step.input_ids.to(device), position_ids=step.position_ids.to(device), use_cache=False, layout=step.layout
            )
        return out.last_hidden_state[0].index_select(0, step.at.to(device))

    def logits(self, hidden: Float[Tensor, "tokens width"], *, first: bool = False) -> Float[Tensor, "tokens rows"]:
        """Logits of hidden states in float32, with `first` by the head as it was before training."""
        head = self.first_head if first and self.first_head is not None else self.head
        with self._precision():
            return functional.linear(hidden.to(head.dtype), head).float()

    def forward(self, lesson: Lesson) -> GoalLosses:
        """Both losses; with several processes each gives its share of the step's means."""
        step, split = lesson.pack, lesson.pack.forget
        logits = self.logits(self.hidden(step))
        labels = step.labels.to(logits.device)
        reference = None if lesson.reference is None else lesson.reference.to(logits.device)
        before = None
        if lesson.states is not None:
            with torch.no_grad():
                before = self.logits(lesson.states.to(logits.device), first=True)
        token = token_logprobs(logits[:split], labels[:split])
        forget = forget_loss(self.goal.forget, token, step.rows[: lesson.forget_rows], reference, beta=self.beta)
        retain = retain_loss(self.goal.retain, logits[split:], labels[split:], before)
        return GoalLosses(forget * lesson.shares[0], retain * lesson.shares[1])

    def train(self, mode: bool = True) -> "WhiteBox":
        """No dropout, so that every pass is the one that inference makes."""
        super().train(mode)
        self.model.eval()
        return self

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def reference(self, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> Reference:
        """P_ref on these rows: the model with its adapter off; without one the model as it is, so ask before training."""
        answers: dict[Encoded, float] = {}
        states: dict[Encoded, Tensor] = {}
        with self._adapter_off():
            for rows, step in _packs(forget if self.goal.by_sequence else ()):
                token = token_logprobs(self.logits(self.hidden(step)), step.labels.to(self.head.device))
                answers.update(zip(rows, answer_logprobs(token, step.rows).tolist(), strict=True))
            for rows, step in _packs(retain if self.goal.retain == "kl" else ()):
                parts = torch.split(self.hidden(step).cpu(), list(step.rows))
                states.update((row, part.clone()) for row, part in zip(rows, parts, strict=True))
        return Reference(answers, states)

    @torch.no_grad()
    def mean_nll(self, rows: Sequence[Encoded]) -> float:
        """Mean NLL of the rows' answers, in nats a token."""
        losses = [
            (nll(token_logprobs(self.logits(self.hidden(step)), step.labels.to(self.head.device))).item(), len(step.labels))
            for _, step in _packs(rows)
        ]
        return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.head.device.type, torch.bfloat16, enabled=self.autocast)

    def _adapter_off(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter() if self.lora else nullcontext()


def build_white_box(
    base: Any, tokenizer: Any, *, goal: Goal, beta: float, trainable: str, rank: int, lora_alpha: int, seed: int, autocast: bool
) -> WhiteBox:
    """Put a LoRA adapter on every linear layer of a loaded model, or with `trainable` "full" free all its weights."""
    lora = trainable == "lora"
    device = base.get_output_embeddings().weight.device
    model = add_lora(base, rank=rank, lora_alpha=lora_alpha, seed=seed) if lora else base.requires_grad_(True)
    return WhiteBox(model, tokenizer, goal=goal, beta=beta, lora=lora, autocast=autocast).to(device)


def _packs(rows: Sequence[Encoded]) -> Iterator[tuple[Sequence[Encoded], Pack]]:
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        yield rows[at : at + _ROWS_AT_ONCE], pack(rows[at : at + _ROWS_AT_ONCE], ())
