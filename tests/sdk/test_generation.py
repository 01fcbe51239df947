"""Whatever the server and however the text is cut into drafts, the answer is that of the slow reference loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoding import LENGTH, PROMPTS, RULE, K, answer, likeness, speaking
from reference import Reference
from uld_adapters.backend import TakesMessages
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.engine import Engine
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


TEXT = {  # servers that are continued by text, and how they are emulated
    "tgi": {"dialect": "tgi", "max_top_n_tokens": 20},
    "openai-chat": {"dialect": "openai", "prefill": "continue_final_message"},
    "openai-text": {"dialect": "openai", "token_prompts": False},
}
NAMES = ["hf", "tgi", "vllm", "llamacpp", "openai-chat", "openai-ids", "openai-text"]


def top(name: str) -> int:
    """The k to ask for: completions of the OpenAI kind give 5."""
    return 5 if name in ("openai-ids", "openai-text") else K


@pytest.fixture(scope="module")
def text_servers(speaking_target: Path) -> Iterator[dict[str, str]]:
    """Addresses by name."""
    engine = Engine.load(speaking_target)
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(EmulatorServer(build_app(engine, **options))).url for name, options in TEXT.items()}


def target_folder(name: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("speaking_target" if name in TEXT else "tiny_target")


def backend_for(name: str, request: pytest.FixtureRequest) -> Any:
    folder, kind = str(target_folder(name, request)), name.partition("-")[0]
    options: dict[str, Any] = {"tokenizer": folder, "top_logprobs": top(name)}
    if kind == "hf":
        return create_backend("hf", model=folder, top_logprobs=K)
    url = request.getfixturevalue("text_servers")[name] if name in TEXT else request.getfixturevalue(f"{kind}_server").url
    if kind == "openai":
        options["route"] = "chat" if name == "openai-chat" else "completions"
    return create_backend(kind, base_url=url, **options)


@pytest.fixture(params=NAMES)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    made = backend_for(request.param, request)
    yield made
    await made.aclose()


@pytest.fixture
def reference(backend: Any, request: pytest.FixtureRequest, small: SmallModel) -> Reference:
    name = request.node.callspec.params["backend"]
    target = AutoModelForCausalLM.from_pretrained(target_folder(name, request), dtype=torch.float32).eval()
    ends = end_token_ids(small.tokenizer)
    start = backend.tokenizer.convert_tokens_to_ids("<|assistant|>")

    def resume(ids: list[int]) -> list[int] | None:
        """Where the server renders conversations, only the answer is the backend's."""
        cut = len(ids) - ids[::-1].index(start) if isinstance(backend, TakesMessages) else 0
        resumed = backend.resume(ids[cut:])
        return None if resumed is None else [*ids[:cut], *resumed]

    return Reference(target, small.backbone, small.head, small.gate, ends, top(name), alpha=RULE.alpha, resume=resume)


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
    plain = Reference(reference.target, reference.backbone, reference.head, None, reference.ends, reference.k, margin=1e9)
    expected, _ = plain.generate(ids, ids, LENGTH)
    result = await answer(backend, None, PROMPTS[0], sampling=Sampling(), mode=Mode.GREEDY)
    assert list(result.token_ids) == expected
    assert result.untouched
    most = {"hf": 0, "llamacpp": 1 + LENGTH}.get(backend.name, 1)  # llama.cpp is asked again for each half character
    assert min(1, most) <= result.report.requests <= most


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
