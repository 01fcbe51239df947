"""Two thousand spoiled answers between client and server: the text is right, or an error is raised."""

from pathlib import Path
from typing import Any

import pytest

from decoding import LENGTH, PROMPTS, RULE, K, answer, likeness, speaking
from fault_proxy import FaultServer
from uld_adapters import http
from uld_adapters.backend import Capabilities
from uld_adapters.emulator import build_app
from uld_adapters.emulator.engine import Engine
from uld_adapters.errors import BackendError
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.classify import Identity
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.scorer import Scorer, Track
from uld_sdk.batching import SmallWorker
from uld_sdk.generation import Answer, Settings
from uld_sdk.prompts import render
from uld_sdk.reading import Reader
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Mode

FAULTS = 1000  # for each dialect


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["tgi", "vllm"])
async def test_spoiled_answers_are_right_or_raise(dialect: str, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    folder = speaking(tiny_target, tmp_path / "target")
    app = build_app(Engine.load(folder), dialect=dialect, max_top_n_tokens=20)
    worker = SmallWorker(Scorer(likeness(tiny_target), threshold=RULE.margin))
    right = raised = 0
    with FaultServer(app, probability=0.0, seed=5) as server:
        backend = create_backend(dialect, base_url=server.url, tokenizer=str(folder), top_logprobs=K, max_retries=0)
        await backend.probe()
        options = [{"sampling": Sampling(), "mode": Mode.GREEDY}, {"sampling": Sampling(0.8, seed=1), "mode": Mode.MATCH}]
        expected = {(p, o): (await answer(backend, worker, p, **options[o])).text for p in PROMPTS for o in (0, 1)}
        server.probability = 0.5
        run = 0
        while sum(server.faults.values()) < FAULTS:
            key = (PROMPTS[run % len(PROMPTS)], run // len(PROMPTS) % 2)
            run += 1
            text = ""
            try:
                capabilities = await backend.probe()
                async for piece in stream(backend, worker, key[0], capabilities, retries=run % 3 * 2, **options[key[1]]):
                    text += piece.text
                    assert expected[key].startswith(text), (key, server.faults)
                assert text == expected[key]
                right += 1
            except BackendError:
                raised += 1
        assert len(server.faults) >= 10, f"not every kind of fault struck: {server.faults}"
        await backend.aclose()
    worker.close()
    assert right > 50
    assert raised > 50


def stream(
    backend: Any, worker: SmallWorker, prompt: str, capabilities: Capabilities, *, sampling: Sampling, mode: Mode, retries: int
) -> Any:
    ids = render(backend.tokenizer, prompt)
    settings = Settings(RULE, sampling, mode, LENGTH, max_retries=retries)
    ends = end_token_ids(backend.tokenizer)
    return Answer(backend, capabilities, settings, ids, ends, reader=Reader(worker, Identity(), ids, Track())).run()
