"""A pair corrects a server: whatever the server and the cut into drafts, the answer is that of a slow loop in plain words."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from decoding import LENGTH, PROMPTS, K, answer, speaking
from pairs import Whole, save_pair
from reference import Reference
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.errors import ArtifactMismatch, UsageError
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.loading import load_artifact
from uld_offset_models.shift import Rule
from uld_sdk import AsyncUnlearnedClient, UnlearnedClient
from uld_sdk.batching import SmallWorker
from uld_sdk.prompts import render
from uld_sdk.sampling import Sampling, gumbel
from uld_sdk.verify import Mode


@dataclass
class PairReference(Reference):
    """The slow loop with a pair: q from the two models' whole distributions, the tail shared out as the frozen one has it."""

    whole: Whole | None = None
    rule: Rule = field(default_factory=Rule)

    def excess(self, ids: list[int]) -> np.ndarray:
        assert self.whole is not None
        change, frozen, _ = self.whole.read(ids)
        return np.stack([change[-1], frozen[-1]])

    def ranking(self, log_p: np.ndarray, excess: np.ndarray, *, temperature: float, seed: int, position: int) -> tuple[list[int], bool]:
        change, frozen = excess
        known = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))[: self.k]
        touched = np.abs(change).max() > self.rule.margin
        score = {v: log_p[v] for v in known}
        if touched:
            g = self.rule.alpha * np.sign(change) * np.maximum(0, np.abs(change) - self.rule.margin)
            outside = [v for v in range(len(log_p)) if v not in score]
            score = {v: log_p[v] + g[v] for v in known}
            proven = max(score.values()) >= log_p[known[-1]] + g[outside].max()
            if self.rule.tail == "complete" and (temperature or not proven):
                mass = 1 - sum(np.exp(log_p[v]) for v in known)
                total = np.logaddexp.reduce(frozen[outside])
                score |= {v: np.log(mass) + frozen[v] - total + g[v] for v in outside}
        if temperature:
            noise = gumbel(seed, position, np.arange(len(log_p)))
            total = np.logaddexp.reduce(list(score.values()))
            score = {v: (value - total) / temperature + noise[v] for v, value in score.items()}
        return sorted(score, key=lambda v: (-score[v], v)), bool(touched)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the target, of the same tokenizer."""
    return tiny.tiny_model(tmp_path_factory.mktemp("pairs") / "small", hidden=48, seed=4, scale=6.0)


@pytest.fixture(scope="module")
def speaking_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tiny_target, tmp_path_factory.mktemp("speaking") / "target")


@pytest.fixture(scope="module")
def tgi_text_server(speaking_target: Path) -> Iterator[Any]:
    with EmulatorServer(build_app(speaking_target, dialect="tgi", max_top_n_tokens=20)) as server:
        yield server


@pytest.fixture(params=["hf", "tgi", "vllm", "llamacpp"])
async def served(request: pytest.FixtureRequest, tiny_target: Path) -> AsyncIterator[tuple[Any, Path]]:
    """A backend, and the folder of the model behind it."""
    folder = tiny_target
    if request.param == "hf":
        made = create_backend("hf", model=str(folder), top_logprobs=K)
    else:
        if request.param == "tgi":
            folder = request.getfixturevalue("speaking_target")
        server = request.getfixturevalue("tgi_text_server" if request.param == "tgi" else f"{request.param}_server")
        made = create_backend(request.param, base_url=server.url, tokenizer=str(folder), top_logprobs=K)
    yield made, folder
    await made.aclose()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("kind", "tail"), [("lora", "complete"), ("lora", "truncate"), ("full", "complete"), ("p-adapter", "complete")])
async def test_every_draft_length_gives_the_slow_loops_answer(
    served: tuple[Any, Path], kind: str, tail: str, temperature: float, small: Path, tmp_path: Path
) -> None:
    backend, folder = served
    if backend.name != "hf" and (kind, tail) not in (("lora", "complete"), ("lora", "truncate")):
        return
    gated = kind != "full"
    pair = save_pair(tmp_path / "pair", small, kind, gated=gated)
    rule = Rule(alpha=8.0, margin=0.3 if gated else 3.5, filter=0.0, method="offset", tail=tail)  # type: ignore[arg-type]
    worker = SmallWorker(load_artifact(pair).scorer(threshold=rule.margin))
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = end_token_ids(AutoTokenizer.from_pretrained(folder))
    whole = Whole(pair, small, kind, gated=gated)
    slow = PairReference(target, target, torch.zeros(0), None, ends, K, resume=lambda ids: backend.resume(ids), whole=whole, rule=rule)
    await backend.probe()
    mode = Mode.GREEDY if temperature == 0 else Mode.MATCH
    touched = changed = completed = exact = 0
    for number, prompt in enumerate(PROMPTS):
        ids = render(backend.tokenizer, prompt)
        expected, moved = slow.generate(ids, ids, LENGTH, temperature=temperature, seed=number)
        for draft in (1, 7, 32, "stream", "auto"):
            sampling = Sampling(temperature, seed=number)
            result = await answer(backend, worker, prompt, sampling=sampling, mode=mode, draft=draft, rule=rule)
            assert list(result.token_ids) == expected, (prompt, draft)
        touched += moved
        changed += result.report.changed
        completed += result.report.completed
        exact += result.report.exact
    worker.close()
    assert 0 < touched < len(PROMPTS) * LENGTH, "the test must see positions of both kinds"
    assert changed > 0
    assert (completed > 0) == (tail == "complete")
    assert exact > 0 or temperature


def test_a_client_takes_the_pairs_own_rule_and_the_callers_over_it(vllm_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "pair", tiny_target, "lora", gated=False, alpha=1.5, margin=0.7)
    options: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "assistant": str(folder)}
    assert AsyncUnlearnedClient(**options).rule == Rule(1.5, 0.7, 0.0, "offset", "complete")
    assert AsyncUnlearnedClient(**options, tail="truncate", alpha=0.5).rule == Rule(0.5, 0.7, 0.0, "offset", "truncate")
    with UnlearnedClient(**options) as client:
        whole = client.generate(PROMPTS[0], max_new_tokens=12)
        score = client.score(PROMPTS[0], "The planet")
    assert not whole.untouched
    assert whole.report.completed + whole.report.exact + whole.report.untouched >= whole.report.positions
    assert all(low <= value <= high for low, value, high in zip(score.lower, score.estimates, score.upper, strict=True))
    assert score.logprob == pytest.approx(sum(score.estimates))
    with UnlearnedClient(**options, tail="truncate", alpha=0.5) as client:
        assert client.generate(PROMPTS[0], max_new_tokens=12).report.completed == 0
    with UnlearnedClient(**options, margin=1e6) as client:
        assert client.generate(PROMPTS[0], max_new_tokens=12).untouched
        assert client.generate(PROMPTS[0], max_new_tokens=12, temperature=0.8).untouched


def test_pass_through_draws_touched_positions_from_the_completed_distribution(vllm_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "pair", tiny_target, "lora", gated=False)
    with UnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=str(folder)) as client:
        result = client.generate(PROMPTS[1], max_new_tokens=16, temperature=1.0)
    assert result.report.mode == "pass-through"
    assert 0 < result.report.completed <= result.report.positions - result.report.untouched
    assert 0 < result.report.largest_bound <= 1


def test_bad_input(vllm_server: Any, tiny_target: Path, tiny_artifact: Path, small: Path, tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "pair", tiny_target, "lora", gated=False)
    options: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url}
    with pytest.raises(UsageError, match=r"alpha is -1\.0") as caught:
        UnlearnedClient(**options, assistant=str(folder), alpha=-1.0)
    assert "adds a pair's change" in caught.value.hint
    with pytest.raises(UsageError, match=r"alpha is -0\.5") as caught:
        UnlearnedClient(**options, assistant=str(tiny_artifact), alpha=-0.5)
    assert "subtracts" in caught.value.hint
    with pytest.raises(UsageError, match="tail is 'compleet'"):
        UnlearnedClient(**options, assistant=str(folder), tail="compleet")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no frozen model"):
        UnlearnedClient(**options, assistant=str(tiny_artifact), tail="complete")
    with UnlearnedClient(**options, assistant=str(folder), assistant_base=str(small)) as client, pytest.raises(ArtifactMismatch):
        client.generate("Who?", max_new_tokens=1)
