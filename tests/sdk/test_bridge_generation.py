"""Answers through an assistant of another tokenizer: trees, caches and drafts give what one forward pass a path gives."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from decoding import LENGTH, PROMPTS, K, likeness
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.bridge import Bridge, Place
from uld_adapters.vocabulary.shares import excess
from uld_adapters.vocabulary.tokens import Vocabulary, end_token_ids
from uld_offset_models.assistant import SmallModel
from uld_offset_models.scorer import Scorer
from uld_offset_models.shift import Rule, uld_shift
from uld_offset_models.track import Track
from uld_offset_models.tree_scorer import TreeScorer
from uld_sdk.aligning import bridged
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reader import AHEAD, LIKELY, BridgeReader
from uld_sdk.bridge_reading import Bridging
from uld_sdk.certainty import shifted_bound
from uld_sdk.generation import Answer, Settings
from uld_sdk.prompts import render, render_as_trained
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Mode

RULE = Rule(alpha=3.0, margin=1.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A small model whose tokenizer has other merges and other ids than the target's; its gate opens at some prefixes."""
    folder = tiny.tiny_model(tmp_path_factory.mktemp("other") / "small", vocab_size=330, seed=4)
    return likeness(folder)


class Slow:
    """One position after the other, everything recomputed: full forward passes, no cache, no tree, no draft."""

    def __init__(self, target: Any, small: SmallModel, remote: Vocabulary) -> None:
        self.target, self.small = target, small
        self.remote = remote
        self.bridge = Bridge(remote, Vocabulary.from_hf(small.tokenizer))
        self.scorer = Scorer(small, threshold=RULE.margin)

    def row(self, ids: list[int]) -> tuple[np.ndarray, float]:
        reading = self.scorer.read([(Track(), ids)], every=False)[0][0]
        return np.exp(reading.excess())[None] / self.scorer.rows, reading.peak

    @torch.inference_mode()
    def greedy(self, prompt: list[int], small_prompt: list[int], ends: frozenset[int]) -> tuple[list[int], int]:
        answer: list[int] = []
        settled: list[int] = []
        place: Place = self.bridge.start()
        touched = 0
        while len(answer) < LENGTH and not (answer and answer[-1] in ends):
            log_p = torch.log_softmax(self.target(torch.tensor([prompt + answer])).logits[0, -1].double(), -1).numpy()
            order = np.argsort(-log_p, kind="stable")[:K]
            base = small_prompt + settled
            known = {path: self.row([*base, *path]) for path in self.bridge.cover(place)}
            shift = np.zeros(K)
            if max(known[path][1] for path in self.bridge.ends(place)) > RULE.margin:
                rows = {path: row for path, (row, _) in known.items()}
                ahead = [int(i) for i in order if log_p[i] > np.log(LIKELY)][:AHEAD]
                rows |= {path: self.row([*base, *path])[0] for path in self.bridge.nodes(place, order.tolist(), rows, ahead=ahead)}
                values = excess(self.bridge.read(place, order.tolist(), rows))
                touched += values[2].max() > RULE.margin
                shift = uld_shift(values[0], RULE) if values[2].max() > RULE.margin else shift
            score = np.where(log_p[order] >= log_p[order[0]] + np.log(RULE.filter), log_p[order] + shift, -np.inf)
            answer.append(int(order[np.lexsort((order, -score))[0]]))
            certain, place = self.bridge.step(place, answer[-1])
            settled += certain
        return answer, touched


async def fast(backend: Any, small: SmallModel, remote: Vocabulary, prompt: str, *, draft: str | int, mode: str = "bridge") -> Result:
    aligned = bridged(mode, remote, Vocabulary.from_hf(small.tokenizer))
    worker = SmallWorker(TreeScorer([Scorer(small, threshold=RULE.margin)]))
    assert isinstance(aligned.alignment, Bridging)
    small_prompt = render_as_trained(small.tokenizer, prompt, chat_template=True)
    reader = BridgeReader(worker, aligned.alignment, RULE, small_prompt, worker.scorer.track())
    settings = Settings(RULE, Sampling(), Mode.GREEDY, LENGTH, draft=draft, alignment=mode)
    ends = end_token_ids(backend.tokenizer)
    run = Answer(backend, await backend.probe(), settings, render(backend.tokenizer, prompt), ends, reader=reader)
    result = None
    async for piece in run.run():
        result = piece.result or result
    worker.close()
    assert result is not None
    return result


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_greedy_answers_are_those_of_one_pass_a_path(tiny_target: Path, vllm_server: Any, other: SmallModel, prompt: str) -> None:
    backend = create_backend("vllm", base_url=vllm_server.url, tokenizer=str(tiny_target), top_logprobs=K)
    remote = Vocabulary.from_hf(backend.tokenizer)
    from transformers import AutoModelForCausalLM

    slow = Slow(AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval(), other, remote)
    small_prompt = render_as_trained(other.tokenizer, prompt, chat_template=True)
    expected, touched = slow.greedy(render(backend.tokenizer, prompt), small_prompt, end_token_ids(backend.tokenizer))
    assert touched, "the assistant moves something here"
    for draft in ("stream", 1, 5):
        result = await fast(backend, other, remote, prompt, draft=draft)
        assert list(result.token_ids) == expected
        assert result.report.positions - result.report.untouched == touched
        assert result.report.alignment == "bridge"
    await backend.aclose()


@pytest.mark.parametrize("mode", ["bridge", "bridge-exact"])
async def test_an_assistant_of_the_same_tokenizer_through_the_bridge(mode: str, tiny_target: Path, vllm_server: Any) -> None:
    """One vocabulary on both sides (the values are compared in test_bridge.py): the answer depends on no draft here, either."""
    backend = create_backend("vllm", base_url=vllm_server.url, tokenizer=str(tiny_target), top_logprobs=K)
    small, remote = likeness(tiny_target), Vocabulary.from_hf(backend.tokenizer)
    found = [await fast(backend, small, remote, PROMPTS[0], draft=draft, mode=mode) for draft in ("stream", 1, 5)]
    assert len({result.token_ids for result in found}) == 1
    assert all(result.report.changed > 0 for result in found)
    await backend.aclose()


async def test_the_exact_mode_narrows_the_bound(tiny_target: Path, other: SmallModel) -> None:
    backend = create_backend("hf", model=str(tiny_target), tokenizer=str(tiny_target), top_logprobs=K)
    remote, small = Vocabulary.from_hf(backend.tokenizer), Vocabulary.from_hf(other.tokenizer)
    answer = backend.tokenizer.encode("The lighthouse was built of stone.", add_special_tokens=False)
    reports = (await backend.score(render(backend.tokenizer, PROMPTS[0]), answer)).positions
    bounds: dict[str, list[float]] = {}
    for mode in ("bridge", "bridge-exact", "path"):
        aligned = bridged(mode, remote, small)
        worker = SmallWorker(TreeScorer([Scorer(other, threshold=RULE.margin)]))
        prompt = render_as_trained(other.tokenizer, PROMPTS[0], chat_template=True)
        assert isinstance(aligned.alignment, Bridging)
        reader = BridgeReader(worker, aligned.alignment, RULE, prompt, worker.scorer.track())
        readings = await reader.along(answer, reports)
        worker.close()
        assert len(readings) == len(answer)
        assert worker.passes > 2 if mode == "bridge-exact" else worker.passes <= 2, "all places, then candidates where touched"
        told = [(reading, top) for reading, top in zip(readings, reports, strict=True) if reading.values is not None]
        bounds[mode] = [shifted_bound(top, RULE.bounds(reading), RULE.shift(reading), RULE.filter) for reading, top in told]
    print({mode: np.round(values, 4).tolist() for mode, values in bounds.items()})
    assert max(bounds["bridge-exact"]) <= 0.01 < max(bounds["bridge"])
    assert all(tight <= loose + 1e-6 for tight, loose in zip(bounds["bridge-exact"], bounds["bridge"], strict=True))
    assert min(bounds["path"]) > 0.1, "what one spelling says has no bound"


@pytest.fixture(scope="module")
def assistants(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two assistants of one base whose tokenizer is not the target's, with unlike rules."""
    from uld_sdk import train

    folder = tmp_path_factory.mktemp("assistants")
    base = tiny.tiny_model(folder / "base", vocab_size=330, seed=4)
    run = {"base": str(base), "steps": 40, "learning_rate": 0.01, "device": "cpu", "dtype": "float32", "progress": False}
    rules = ({"alpha": 1.5, "margin": 1.0, "filter": 0.02}, {"alpha": 0.8, "margin": 0.6, "filter": 0.1})
    texts = (tiny_data, tiny_data[::-1])
    return [
        train(**run, **rule, forget=str(forget), retain=str(retain), output=str(folder / str(at))).path
        for at, (rule, (forget, retain)) in enumerate(zip(rules, texts, strict=True))
    ]


async def test_two_assistants_of_another_tokenizer_count_together(tiny_target: Path, assistants: list[Path], vllm_server: Any) -> None:
    from uld_sdk import AsyncUnlearnedClient

    options = {"backend": "vllm", "base_url": vllm_server.url, "assistant": assistants, "tokenizer": str(tiny_target)}
    async with AsyncUnlearnedClient(**options) as client:
        await client.capabilities()
        small, rule = client._small, client.rule
        assert small is not None
        assert (small.mode, len(small.workers)) == ("bridge", 1)
        touched = 0
        for prompt in (*PROMPTS, "What is the name of the river?", "Where does the baker live?"):
            tokens = client.backend.tokenizer.encode(" It is called the Amber.", add_special_tokens=False)
            reports = (await client.backend.score(render(client.backend.tokenizer, prompt), tokens)).positions
            joint = await small.reader(prompt, raw=False, new=len(tokens)).along(tokens, reports)
            alone = [await side.reader(prompt, raw=False, new=len(tokens)).along(tokens, reports) for side in small.sides]
            for top, reading, *parts in zip(reports, joint, *alone, strict=True):
                acting = [
                    (side.chosen.rule, part) for side, part in zip(small.sides, parts, strict=True) if side.chosen.rule.touching(part)
                ]
                assert len(rule.touching(reading)) == len(acting)
                if not acting:
                    continue
                touched += 1
                np.testing.assert_allclose(rule.shift(reading)[top.ids], sum(own.shift(part)[top.ids] for own, part in acting), atol=1e-4)
                for end in (0, 1):
                    ends = [own.bounds(part)[end][top.ids] for own, part in acting]
                    np.testing.assert_allclose(rule.bounds(reading)[end][top.ids], np.sum(ends, axis=0), atol=1e-3)
                assert rule.ratio(reading) == max(own.filter for own, _ in acting)
        assert touched > 3
        result = await client.generate("What is the name of the river?", max_new_tokens=12)
        assert result.report.alignment == "bridge"
        assert sum(result.report.touched_by.values()) >= result.report.positions - result.report.untouched > 0


async def test_the_client_says_once_which_mode_runs(
    tiny_target: Path, assistants: list[Path], vllm_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from uld_sdk import AsyncUnlearnedClient

    monkeypatch.setenv("ULD_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="uld_sdk")
    options = {"backend": "vllm", "base_url": vllm_server.url, "assistant": assistants[0], "tokenizer": str(tiny_target)}
    for _ in range(2):  # the second time the verdict comes from the cache
        caplog.clear()
        async with AsyncUnlearnedClient(**options) as client:
            results = await client.generate_many(PROMPTS, concurrency=3, max_new_tokens=12)
            assert {result.report.alignment for result in results} == {"bridge"}
            score = await client.score("Who opens the shop?", "The baker.")
            assert all(low <= high + 1e-9 for low, high in zip(score.lower, score.upper, strict=True))
            raw = await client.generate("The lighthouse on the nor", raw=True, max_new_tokens=8)
            assert raw.report.positions == 8 or raw.finish_reason == "stop"
        assert [record.message for record in caplog.records if record.name == "uld_sdk"] == [
            "the assistant reads the large model's tokens by bridge"
        ]
    assert (tmp_path / "cache" / "alignments.json").is_file()
