"""A causal model with what training moves in it: a LoRA adapter, all its weights, or a p-adapter before its input."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from uld_offset_models.assistant import real_rows, tolerating_peft
from uld_offset_models.encoding import Encoded
from uld_offset_models.network import add_lora
from uld_offset_models.packing import Pack, pack, use_packed_attention

ROWS_AT_ONCE = 16


class Tuned(torch.nn.Module):
    """`model` is a peft model for `lora` and `p-adapter`, for `full` the transformers model itself.

    A p-adapter is peft's p-tuning: embeddings made by a small encoder stand before those of the text. It is our reading of the word
    in arXiv 2404.11045. Logits are those of the real rows of the head. With `autocast` it computes in bfloat16, whatever type the
    weights are kept in.
    """

    def __init__(self, model: Any, tokenizer: Any, *, trainable: str, autocast: bool) -> None:
        super().__init__()
        self.model, self.trainable, self.autocast = model, trainable, autocast
        self._virtual = trainable == "p-adapter"
        use_packed_attention(self.inner)
        self.vocabulary = len(real_rows(self.inner, tokenizer))

    @property
    def inner(self) -> Any:
        """The transformers model."""
        return self.model if self.trainable == "full" else self.model.get_base_model()

    @property
    def head(self) -> Tensor:
        """The real rows of the output embedding (rows, width)."""
        return self.inner.get_output_embeddings().weight[: self.vocabulary]

    def hidden(self, step: Pack) -> Float[Tensor, "tokens width"]:
        """Final hidden states at the positions that predict an answer token."""
        device = self.head.device
        ids, positions, at, layout = step.input_ids.to(device), step.position_ids.to(device), step.at.to(device), step.layout
        given = {"input_ids": ids}
        with self.precision():
            if self._virtual:
                embeddings = self.inner.get_input_embeddings()(ids)
                prompt = self.model.get_prompt(batch_size=1).to(embeddings.dtype)
                count = prompt.shape[1]  # every row sees them: they lie in the part that rows share
                given = {"inputs_embeds": torch.cat([prompt, embeddings], 1)}
                positions = torch.cat([torch.arange(count, device=device).unsqueeze(0), positions + count], 1)
                at, layout = at + count, replace(layout, shared=layout.shared + count)
            out = self.inner.base_model(**given, position_ids=positions, use_cache=False, layout=layout)
        return out.last_hidden_state[0].index_select(0, at)

    def logits(self, hidden: Float[Tensor, "tokens width"], *, head: Tensor | None = None) -> Float[Tensor, "tokens rows"]:
        """Logits of hidden states in float32, by another head if one is given."""
        head = self.head if head is None else head
        with self.precision():
            return functional.linear(hidden.to(head.dtype), head).float()

    def train(self, mode: bool = True) -> "Tuned":
        """No dropout, so that every pass is the one that inference makes."""
        super().train(mode)
        self.model.eval()
        return self

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def states(self, rows: Sequence[Encoded]) -> dict[Encoded, Tensor]:
        """Final hidden states (tokens, width) at each row's answer positions, on the CPU."""
        found: dict[Encoded, Tensor] = {}
        for some, step in packs(rows):
            parts = torch.split(self.hidden(step).cpu(), list(step.rows))
            found.update((row, part.clone()) for row, part in zip(some, parts, strict=True))
        return found

    def precision(self) -> torch.autocast:
        """The type that passes compute in."""
        return torch.autocast(self.head.device.type, torch.bfloat16, enabled=self.autocast)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """The model with its adapter off; without one it is as it is, so ask before training."""
        virtual, self._virtual = self._virtual, False
        try:
            with self.model.disable_adapter() if self.trainable == "lora" else nullcontext():
                yield
        finally:
            self._virtual = virtual


def make_trainable(base: Any, *, trainable: str, rank: int, lora_alpha: int, seed: int, virtual_tokens: int = 0) -> Any:
    """Put a seeded adapter on a loaded model, or with `full` free all its weights."""
    if trainable == "full":
        return base.requires_grad_(True)
    if trainable == "lora":
        return add_lora(base, rank=rank, lora_alpha=lora_alpha, seed=seed)
    from peft import PromptEncoderConfig, get_peft_model

    torch.manual_seed(seed)
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens, encoder_hidden_size=base.config.hidden_size)
    with tolerating_peft():
        return get_peft_model(base, config)


def packs(rows: Sequence[Encoded]) -> Iterator[tuple[Sequence[Encoded], Pack]]:
    """A few rows at a time, packed."""
    for at in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[at : at + ROWS_AT_ONCE], pack(rows[at : at + ROWS_AT_ONCE], ())
