"""The pair of small models of delta-unlearning at inference: o' = the adapter on, o = the adapter off, or two checkpoints."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uld_offset_models.assistant import SmallModel, real_rows, tolerating_peft
from uld_offset_models.thin import thinned

if TYPE_CHECKING:
    from uld_offset_models.assistant import Gate


@dataclass
class Pair:
    """The models o' and o; the gate c is that of `tuned` and reads its hidden states.

    `prompt` are keys and values (heads, tokens, head_dim) of each layer for the virtual tokens that stand before the texts of o'.
    """

    tuned: SmallModel
    frozen: SmallModel
    prompt: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def shared(self) -> bool:
        """Whether both are one backbone, whose batch then holds the texts of both."""
        return self.tuned.backbone is self.frozen.backbone

    @property
    def one_head(self) -> bool:
        """Whether both have the same output embedding."""
        return self.tuned.head is self.frozen.head


def load_pair(
    path: Path, base: Any, tokenizer: Any, gate: "Gate | None", *, whole: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Pair:
    """Make a pair of a loaded base, which is o, and what a folder holds of o': a p-adapter, or a `whole` model of its own.

    A LoRA adapter is for `adapter_batch`.
    """

    def ready(model: Any, gate: "Gate | None" = None) -> SmallModel:
        model = thinned(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
        return SmallModel(model.base_model, real_rows(model, tokenizer), gate, tokenizer)

    if whole:
        from transformers import AutoModelForCausalLM

        second = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True)
        return Pair(ready(second, gate), ready(base))
    from peft import PeftModel

    with tolerating_peft():
        adapter = PeftModel.from_pretrained(base, str(path))
    virtual = adapter.get_prompt(batch_size=1).detach()
    tuned = ready(adapter.get_base_model(), gate)
    return Pair(tuned, replace(tuned, gate=None), _read_first(tuned, virtual))


@torch.no_grad()
def _read_first(model: SmallModel, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer for embeddings (1, tokens, width) at the beginning of a text."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model.backbone(inputs_embeds=embeddings.to(model.head), past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]
