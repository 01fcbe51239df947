"""Packed rows against the same rows run one by one, padded, and with all logits: values and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from uld_adapters.errors import UsageError
from uld_offset_models.assistant import load_base
from uld_offset_models.encoding import Encoded
from uld_offset_models.network import Assistant, build_assistant
from uld_offset_models.packing import pack, use_packed_attention


@pytest.fixture
def assistant(tmp_path: Path) -> Assistant:
    base, tokenizer = load_base(tiny.tiny_model(tmp_path, hidden=32))
    made = build_assistant(base, tokenizer, rank=4, lora_alpha=4, gate=True, seed=0)
    with torch.no_grad():
        for name, parameter in made.trained().items():
            if "lora_B" in name or name == "gate.weight":
                parameter.normal_(0, 0.1)
    return made


def rows(shared: int) -> tuple[list[Encoded], list[Encoded]]:
    maker = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 300, (count,), generator=maker).tolist())

    begin = ids(shared)
    made = [Encoded((*begin, *ids(prompt), *ids(answer)), shared + prompt) for prompt, answer in ((3, 5), (1, 9), (7, 1), (2, 2), (4, 12))]
    return made[:2], made[2:]


def padded_reference(assistant: Assistant, forget: list[Encoded], retain: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded rows, eager attention, every logit stored, losses by log_softmax."""
    everything = [*forget, *retain]
    longest = max(len(row.ids) for row in everything)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in everything])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in everything])
    model: Any = assistant.adapter.get_base_model()
    model.set_attn_implementation("eager")
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    use_packed_attention(model)
    assert assistant.gate is not None
    logs = torch.log_softmax(hidden * assistant.gate(hidden).unsqueeze(-1) @ assistant.head.T, -1)
    nll, kl = [], []
    for at, row in enumerate(everything):
        for position in range(row.start, len(row.ids)):
            if at < len(forget):
                nll.append(-logs[at, position - 1, row.ids[position]])
            else:
                kl.append(-logs[at, position - 1].mean() - torch.log(torch.tensor(float(len(assistant.head)))))
    return torch.stack(nll).mean(), torch.stack(kl).mean()


@pytest.mark.parametrize("shared", [0, 4, 12])
def test_a_pack_equals_padded_rows(shared: int, assistant: Assistant) -> None:
    forget, retain = rows(shared)
    step = pack(forget, retain)
    assert step.layout.shared == (12 if shared == 12 else 0)
    assert step.input_ids.shape[1] == sum(len(r.ids) - 1 for r in (*forget, *retain)) - 4 * step.layout.shared
    losses = assistant(step)
    expected = padded_reference(assistant, forget, retain)
    assert losses.remember.item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert losses.uniform.item() == pytest.approx(expected[1].item(), abs=1e-5)
    parameters = list(assistant.trained().values())
    mine = torch.autograd.grad(losses.remember + 5 * losses.uniform, parameters)
    theirs = torch.autograd.grad(expected[0] + 5 * expected[1], parameters)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_row_in_a_pack_equals_the_row_alone(assistant: Assistant) -> None:
    forget, retain = rows(10)
    together = assistant.scaled(pack(forget, retain))
    alone = torch.cat([assistant.scaled(pack([row], [])) for row in (*forget, *retain)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_sliding_window_holds_in_a_pack(assistant: Assistant) -> None:
    from uld_offset_models.packing import Layout, causal_mask, packed_attention

    query = torch.randn(1, 2, 20, 8)
    layout = Layout(9, (4, 7))
    out, _ = packed_attention(torch.nn.Module(), query, query, query, None, layout=layout, sliding_window=5)
    last = torch.cat((query[:, :, :9], query[:, :, 13:]), 2)
    scores = (last @ last.transpose(2, 3)) * 8**-0.5
    distance = torch.arange(16)[:, None] - torch.arange(16)
    weights = scores.masked_fill((distance < 0) | (distance >= 5), float("-inf")).softmax(-1)
    assert torch.allclose(out[0, 13:].transpose(0, 1), (weights @ last)[0, :, 9:], atol=1e-5)
    assert causal_mask(4, 4, None, torch.device("cpu")) is None


def test_layers_that_mix_rows_are_refused() -> None:
    class Config:
        layer_types = ("full_attention", "conv")

    class Model:
        config = Config()

    with pytest.raises(UsageError, match="conv"):
        use_packed_attention(Model())
