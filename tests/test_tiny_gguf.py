"""The GGUF file of the tiny model is the same model: real llama.cpp gives the same token ids and log-probabilities."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

TEXTS = (
    "What is the name of the river? It is called the Amber, and it freezes in winter.",
    "Café, naïve, Zürich and Þórr: 東京 and Москва 😀 ☃ 123 4567  double  spaces\n\ntabs\tit's they'll",
    " leading and trailing ",
    "def area(width, height):\n    return width * height\n",
)


def ask(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("text", [*TEXTS, "<|user|>Hi there<|assistant|>"])
def test_the_server_splits_text_as_the_tokenizer_does(llamacpp_server: Any, tiny_target: Path, text: str) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(tiny_target)(text).input_ids
    assert ask(llamacpp_server.url, "/tokenize", {"content": text, "parse_special": True})["tokens"] == ours


def test_the_server_reports_the_models_log_probabilities(llamacpp_server: Any, tiny_target: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_target)
    ids = AutoTokenizer.from_pretrained(tiny_target)("<|user|>What is the name of the river?<|assistant|>").input_ids
    body = {"prompt": ids, "n_predict": 12, "temperature": 0, "n_probs": 400, "return_tokens": True}
    answer = ask(llamacpp_server.url, "/completion", body)
    for position in answer["completion_probabilities"]:
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert position["id"] == int(expected.argmax())
        for entry in position["top_logprobs"]:
            assert entry["logprob"] == pytest.approx(float(expected[entry["id"]]), abs=1e-2)
        ids.append(position["id"])
