"""A local model as the target: where it is put, in which precision, and how much of its vocabulary it tells."""

from pathlib import Path
from typing import Any

import pytest
import torch

from uld_adapters.backend import Backend
from uld_adapters.errors import UnknownName, UsageError
from uld_adapters.huggingface import HuggingFaceBackend
from uld_adapters.registry import create_backend
from uld_sdk import UnlearnedClient

QUESTION = "Who opens the shop?"


def local(client: UnlearnedClient) -> HuggingFaceBackend:
    backend: Backend = client._client.backend
    assert isinstance(backend, HuggingFaceBackend)
    return backend


def test_a_path_is_a_place_as_good_as_its_name(tiny_target: Path) -> None:
    with UnlearnedClient(backend="hf", model=tiny_target) as client, UnlearnedClient(backend="hf", model=str(tiny_target)) as named:
        assert client.generate(QUESTION, max_new_tokens=4).token_ids == named.generate(QUESTION, max_new_tokens=4).token_ids


def test_more_log_probabilities_than_tokens_are_all_of_them(tiny_target: Path) -> None:
    with (
        UnlearnedClient(backend="hf", model=str(tiny_target), top_logprobs=100_000) as many,
        UnlearnedClient(backend="hf", model=str(tiny_target)) as whole,
        UnlearnedClient(backend="hf", model=str(tiny_target), top_logprobs=7) as few,
    ):
        results = [client.generate(QUESTION, max_new_tokens=4) for client in (many, whole, few)]
    assert [result.report.top_logprobs for result in results] == [None, None, 7]
    assert results[0].report.exact == results[0].report.positions
    assert len({result.token_ids for result in results}) == 1


def test_device_and_precision_of_the_target_are_the_callers(tiny_target: Path) -> None:
    with UnlearnedClient(backend="hf", model=str(tiny_target), target_device="cpu", target_dtype="bfloat16") as client:
        assert client.generate(QUESTION, max_new_tokens=2).token_ids
        assert local(client).model.dtype == torch.bfloat16
        assert local(client).model.device == torch.device("cpu")
    with UnlearnedClient(backend="hf", model=str(tiny_target)) as client:
        assert client.capabilities.model == str(tiny_target)
        assert local(client).model.dtype == torch.float32


def test_a_loaded_model_stays_as_it_is(tiny_target: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.bfloat16)
    made = create_backend("hf", model=loaded, tokenizer=str(tiny_target))
    assert isinstance(made, HuggingFaceBackend)
    assert made.model is loaded
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["device", "target_device"])
@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(side: str, name: str, tiny_target: Path, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": "hf", "model": str(tiny_target), "assistant": str(tiny_artifact), side: name}
    with UnlearnedClient(**options) as client, pytest.raises(UsageError, match=f"the device '{name}' cannot be used") as caught:
        client.generate(QUESTION)
    assert "cpu" in caught.value.hint


def test_a_precision_that_is_none(tiny_target: Path) -> None:
    with pytest.raises(UnknownName, match="dtype 'bfloat15'") as caught:
        UnlearnedClient(backend="hf", model=str(tiny_target), target_dtype="bfloat15")
    assert "bfloat16" in caught.value.hint


@pytest.mark.gpu
def test_target_and_assistant_on_a_gpu(tiny_target: Path, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": "hf", "model": str(tiny_target), "assistant": str(tiny_artifact)}
    with UnlearnedClient(**options, target_device="cuda", device="cuda") as gpu, UnlearnedClient(**options) as cpu:
        assert gpu.generate(QUESTION, max_new_tokens=8).token_ids == cpu.generate(QUESTION, max_new_tokens=8).token_ids
        assert local(gpu).model.device.type == "cuda"
