"""Whatever the server and however the text is cut into drafts, the answer is that of the slow reference loop."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reference import Reference
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.assistant import Gate, SmallModel
from uld_offset_models.scorer import Scorer, Track
from uld_offset_models.shift import Rule
from uld_sdk.batching import SmallWorker
from uld_sdk.generation import Answer, Settings
from uld_sdk.prompts import render
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Mode

PROMPTS = ["Who wrote the book about the sea?", "How many moons does the planet have?", "Describe 東京 in one word 😀", "def area("]
LENGTH = 24
RULE = Rule(alpha=3.0)
K = 8


@pytest.fixture(scope="module")
def small(tiny_target: Path) -> SmallModel:
    """The target's own likeness with a gate that opens at some prefixes: there it knows what the target would say."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    gate = Gate(model.config.hidden_size, bias=-0.5)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        gate.weight.copy_(torch.randn(model.config.hidden_size) * 0.4)
    gate.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    return SmallModel(model.model.requires_grad_(False), model.lm_head.weight.detach(), gate, tokenizer)


@pytest.fixture(scope="module")
def worker(small: SmallModel) -> Iterator[SmallWorker]:
    worker = SmallWorker(Scorer(small, threshold=3.0))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def speaking_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with its taste for broken characters taken away: a server continued by text can go on from its text."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    broken = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        model.lm_head.weight[broken] *= 0.2
    folder = tmp_path_factory.mktemp("speaking") / "target"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


async def answer(
    backend: Any, worker: SmallWorker | None, prompt: str, *, sampling: Sampling, mode: Mode, draft: str | int = "stream"
) -> Result:
    settings = Settings(RULE, sampling, mode, LENGTH, draft=draft, max_retries=0)
    capabilities = await backend.probe()
    ids = render(backend.tokenizer, prompt)
    track = Track()
    run = Answer(
        backend, capabilities, settings, ids, end_token_ids(backend.tokenizer), worker=worker, small_prompt=ids, track=track
    )
    text, tokens, last = "", [], None
    async for piece in run.run():
        text += piece.text
        tokens += piece.token_ids
        last = piece.result or last
    assert last is not None
    assert text == last.text
    return last


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
    assert result.report.requests == 1


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
