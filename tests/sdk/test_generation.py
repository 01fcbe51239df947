"""Whatever the server and however the text is cut into drafts, the answer is that of the slow reference loop."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoding import LENGTH, PROMPTS, RULE, K, answer, likeness, speaking
from reference import Reference
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.assistant import SmallModel
from uld_offset_models.scorer import Scorer
from uld_sdk.batching import SmallWorker
from uld_sdk.prompts import render
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Mode


@pytest.fixture(scope="module")
def small(tiny_target: Path) -> SmallModel:
    return likeness(tiny_target)


@pytest.fixture(scope="module")
def worker(small: SmallModel) -> Iterator[SmallWorker]:
    worker = SmallWorker(Scorer(small, threshold=3.0))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def speaking_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tiny_target, tmp_path_factory.mktemp("speaking") / "target")


@pytest.fixture(scope="module")
def tgi_text_server(speaking_target: Path) -> Iterator[Any]:
    with EmulatorServer(build_app(speaking_target, dialect="tgi", max_top_n_tokens=20)) as server:
        yield server


def target_folder(name: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("speaking_target" if name == "tgi" else "tiny_target")


def backend_for(name: str, request: pytest.FixtureRequest) -> Any:
    folder = str(target_folder(name, request))
    if name == "tgi":
        return create_backend("tgi", base_url=request.getfixturevalue("tgi_text_server").url, tokenizer=folder, top_logprobs=K)
    if name == "hf":
        return create_backend("hf", model=folder, top_logprobs=K)
    server = request.getfixturevalue(f"{name}_server")
    return create_backend(name, base_url=server.url, tokenizer=folder, top_logprobs=K)


@pytest.fixture(params=["hf", "tgi", "vllm", "llamacpp"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    made = backend_for(request.param, request)
    yield made
    await made.aclose()


@pytest.fixture
def reference(backend: Any, request: pytest.FixtureRequest, small: SmallModel) -> Reference:
    target = AutoModelForCausalLM.from_pretrained(target_folder(backend.name, request), dtype=torch.float32).eval()
    ends = end_token_ids(small.tokenizer)
    return Reference(target, small.backbone, small.head, small.gate, ends, K, alpha=RULE.alpha, resume=lambda ids: backend.resume(ids))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_every_draft_length_gives_the_reference_answer(
    backend: Any, worker: SmallWorker, reference: Reference, temperature: float
) -> None:
    await backend.probe()
    mode = Mode.GREEDY if temperature == 0 else Mode.MATCH
    touched = changed = 0
    for number, prompt in enumerate(PROMPTS):
        ids = render(backend.tokenizer, prompt)
        expected, moved = reference.generate(ids, ids, LENGTH, temperature=temperature, seed=number)
        for draft in (1, 7, 32, "stream", "auto"):
            result = await answer(backend, worker, prompt, sampling=Sampling(temperature, seed=number), mode=mode, draft=draft)
            assert list(result.token_ids) == expected, (prompt, draft)
            assert result.report.positions - result.report.untouched >= min(1, moved) * (result.report.retokenised == 0)
        touched += moved
        changed += result.report.changed
    assert 0 < touched < len(PROMPTS) * LENGTH, "the test must see positions of both kinds"
    assert changed > 0


async def test_the_plain_remote_is_left_as_it_is(backend: Any, reference: Reference) -> None:
    await backend.probe()
    ids = render(backend.tokenizer, PROMPTS[0])
    plain = Reference(reference.target, reference.backbone, reference.head, None, reference.ends, K, margin=1e9)
    expected, _ = plain.generate(ids, ids, LENGTH)
    result = await answer(backend, None, PROMPTS[0], sampling=Sampling(), mode=Mode.GREEDY)
    assert list(result.token_ids) == expected
    assert result.untouched
    most = {"hf": 0, "tgi": 1, "vllm": 1, "llamacpp": 1 + LENGTH}  # llama.cpp is asked again for each half character
    assert min(1, most[backend.name]) <= result.report.requests <= most[backend.name]


async def test_many_answers_share_the_small_models_passes(request: pytest.FixtureRequest, small: SmallModel) -> None:
    backend = backend_for("vllm", request)
    worker = SmallWorker(Scorer(small, threshold=3.0))
    options = {"sampling": Sampling(), "mode": Mode.GREEDY}
    single = [await answer(backend, worker, prompt, **options) for prompt in PROMPTS]
    alone, worker.passes = worker.passes, 0
    together = await asyncio.gather(*(answer(backend, worker, prompt, **options) for prompt in PROMPTS))
    assert [r.token_ids for r in together] == [r.token_ids for r in single]
    assert worker.passes < alone
    worker.close()
    await backend.aclose()
