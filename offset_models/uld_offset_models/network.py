"""The assistant as one trainable module: packed rows in, the two losses of the step out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.assistant import Gate, real_rows, tolerating_peft
from uld_offset_models.encoding import Encoded
from uld_offset_models.objectives import divergence, linear_logsumexp, nll, peak_excess
from uld_offset_models.packing import Pack, pack, use_packed_attention

_ROWS_AT_ONCE = 16


class Losses(NamedTuple):
    """Mean losses of one step in nats: `remember` over forget answers, `uniform` over retain answers."""

    remember: Float[Tensor, ""]
    uniform: Float[Tensor, ""]


class Assistant(torch.nn.Module):
    """A frozen base with a LoRA adapter, and the gate; LoRA and gate are float32 whatever the base is.

    `adapter` is the peft model. A bfloat16 base runs under autocast; logits come from the real rows of the head only.
    """

    head: Tensor
    mean_row: Tensor

    def __init__(self, adapter: Any, gate: Gate | None, tokenizer: Any) -> None:
        super().__init__()
        self.adapter = adapter
        self.gate = gate
        inner = adapter.get_base_model()
        use_packed_attention(inner)
        head = real_rows(inner, tokenizer)
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("mean_row", head.float().mean(0), persistent=False)
        self.autocast = head.dtype == torch.bfloat16

    def scaled(self, step: Pack) -> Float[Tensor, "answers width"]:
        """C * h at the positions that predict an answer token."""
        device = self.head.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            out = self.adapter.get_base_model().base_model(
                input_ids=step.input_ids.to(device), position_ids=step.position_ids.to(device), use_cache=False, layout=step.layout
            )
        hidden = out.last_hidden_state[0].index_select(0, step.at.to(device)).float()
        if self.gate is not None:
            hidden = hidden * self.gate(hidden).unsqueeze(-1)
        return hidden.to(self.head.dtype)

    def forward(self, step: Pack) -> Losses:
        """Both mean losses; the means run over the answer tokens of all processes."""
        scaled, split = self.scaled(step), step.forget
        lse = linear_logsumexp(scaled, self.head)
        labels = step.labels[:split].to(self.head.device)
        remembered = nll(scaled[:split], self.head, labels, lse[:split]).sum()
        flattened = divergence(scaled[split:], self.head, self.mean_row, lse[split:]).sum()
        return Losses(remembered / step.totals[0], flattened / step.totals[1])

    def train(self, mode: bool = True) -> "Assistant":
        """The frozen base never drops anything out, so that every pass is the one that inference makes."""
        super().train(mode)
        self.adapter.eval()
        return self

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def untouched_share(self, rows: Sequence[Encoded], *, margin: float) -> float:
        """Share of rows with every answer position untouched: max over y of log p_a(y) - log u at most `margin` nats."""
        was = self.training
        self.eval()
        untouched = 0
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            step = pack(rows[at : at + _ROWS_AT_ONCE], ())
            peaks = peak_excess(self.scaled(step), self.head)
            untouched += sum(bool((peak <= margin).all()) for peak in torch.split(peaks, list(step.rows)))
        self.train(was)
        return untouched / len(rows)


def build_assistant(base: Any, tokenizer: Any, *, rank: int, lora_alpha: int, gate: bool, seed: int) -> Assistant:
    """Put a LoRA adapter on every linear layer of a loaded base and a gate over its logits; seeded before either is made."""
    adapter = add_lora(base, rank=rank, lora_alpha=lora_alpha, seed=seed)
    device = base.get_output_embeddings().weight.device
    return Assistant(adapter, Gate(base.config.hidden_size).to(device) if gate else None, tokenizer).to(device)


def add_lora(base: Any, *, rank: int, lora_alpha: int, seed: int) -> Any:
    """The peft model of a loaded base with a seeded LoRA adapter on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tolerating_peft():
        return get_peft_model(base, config)
