"""Artifacts of pairs that look trained, made from tiny models in no time."""

from pathlib import Path
from typing import Any

import torch

from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
from uld_offset_models.artifact import save_artifact
from uld_offset_models.assistant import Gate, base_fingerprint, load_base
from uld_offset_models.manifest import BaseReference, Manifest, PairReference
from uld_offset_models.tuned import make_trainable

KINDS = ("lora", "full", "p-adapter")


def save_pair(output: Path, base: Path, kind: str, *, gated: bool, noise: float = 0.05, seed: int = 1, **inference: Any) -> Path:
    """Save a pair whose o' was moved away from o at random; `inference` are fields of the manifest."""
    model, tokenizer = load_base(base)
    trained = make_trainable(model, trainable=kind, rank=4, lora_alpha=8, virtual_tokens=3, seed=0)
    gate = Gate(model.config.hidden_size, bias=0.0) if gated else None
    maker = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=maker))
        if gate is not None:
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=maker))
    manifest = Manifest(
        method="offset",
        preset="offset",
        base=BaseReference(id=str(base), sha256=base_fingerprint(base), layers=model.config.num_hidden_layers),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        chat_template=True,
        pair=PairReference(
            objective="npo+kl", alpha=1.0, tail="complete", trainable=kind, whole=kind == "full", target="a target", top_logprobs=20
        ),
        gate=gated,
        dtype="float32",
        training={},
        data={},
        versions={},
        training_seconds=1.0,
        losses={"forget": 0.5, "retain": 0.1},
        steps=1,
        assistant_parameters=9,
        trainable_parameters=3,
        created="2026-01-01T00:00:00+00:00",
        **{"alpha": 1.0, "margin": 0.5, "filter": 0.0, "tail": "complete", **inference},
    )
    save_artifact(output, model=trained, gate=gate, tokenizer=tokenizer, manifest=manifest)
    return output


class Whole:
    """Both models by transformers and peft alone, a text at a time: the slow version of a pair's scorer."""

    def __init__(self, folder: Path, base: Path, kind: str, *, gated: bool) -> None:
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        from uld_offset_models.assistant import tolerating_peft

        self.frozen = AutoModelForCausalLM.from_pretrained(base).eval()
        if kind == "full":
            self.tuned = AutoModelForCausalLM.from_pretrained(folder).eval()
        else:
            with tolerating_peft():
                self.tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
        self.gate = None
        if gated:
            self.gate = Gate(self.frozen.config.hidden_size)
            self.gate.load_state_dict(load_file(folder / "gate.safetensors"))

    @torch.inference_mode()
    def read(self, ids: list[int]) -> tuple[Any, Any, Any]:
        """The change d, log p_o (tokens, rows) and the gate (tokens,) after each token of a text, as float64."""
        out = self.tuned(input_ids=torch.tensor([ids]), output_hidden_states=True)
        tuned = torch.log_softmax(out.logits[0, -len(ids) :].double(), -1)
        frozen = torch.log_softmax(self.frozen(torch.tensor([ids])).logits[0].double(), -1)
        gate = torch.ones(len(ids)) if self.gate is None else self.gate(out.hidden_states[-1][0, -len(ids) :])
        return (gate.double()[:, None] * (tuned - frozen)).numpy(), frozen.numpy(), gate.numpy()
