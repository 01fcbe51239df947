"""However a draft is read, in few passes or one position at a time: the small models say the same of every position."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from decoding import LENGTH, PROMPTS, K, likeness
from pairs import save_pair
from uld_adapters import http
from uld_adapters.backend import ServerSampling
from uld_adapters.errors import ContextExceeded, StreamInterrupted
from uld_adapters.logprobs import Draft, TopLogprobs
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.alignment import Identity
from uld_adapters.vocabulary.tokens import Vocabulary, end_token_ids
from uld_offset_models.assistant import SmallModel
from uld_offset_models.loading import load_artifact
from uld_offset_models.scorer import Scorer
from uld_offset_models.several import JointRule
from uld_offset_models.shift import Rule
from uld_offset_models.tree_scorer import TreeScorer
from uld_sdk.aligning import bridged
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reader import LONGEST_PATH, BridgeReader
from uld_sdk.bridge_reading import BridgedReading, Bridging
from uld_sdk.generation import Answer
from uld_sdk.joint_reader import JointReader
from uld_sdk.prompts import render, render_as_trained
from uld_sdk.reading import Reader
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling
from uld_sdk.settings import Settings
from uld_sdk.verify import Mode

RULE = Rule(alpha=3.0, margin=1.0)
KINDS = ("assistant", "assistant without masks", "exact", "path", "pair", "two assistants", "two bases")


class InPieces:
    """A backend whose drafts come in pieces of any size, and now and then break off after one."""

    def __init__(self, inner: Any, seed: int) -> None:
        self.inner, self.rng, self.broken = inner, np.random.default_rng(seed), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling) -> AsyncGenerator[Draft]:
        draft = await self.inner.draft(prefix, n, sampling)
        at = 0
        while at < len(draft.tokens):
            if at and self.rng.random() < 0.15:
                self.broken += 1
                raise StreamInterrupted("the stream broke off")
            end = min(at + int(self.rng.integers(1, 7)), len(draft.tokens))
            yield replace(
                draft,
                tokens=draft.tokens[at:end],
                positions=draft.positions[at:end],
                finish=draft.finish if end == len(draft.tokens) else None,
            )
            at = end


@dataclass
class Watched:
    """A reader, and what it said of each position that was reported."""

    inner: Any
    seen: dict[int, tuple[TopLogprobs, Sequence[int], Any]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def informed(self, reading: Any, position: int, top: TopLogprobs, *, also: Sequence[int] = ()) -> None:
        await self.inner.informed(reading, position, top, also=also)
        self.seen[position] = (top, also, reading)


@dataclass
class Small:
    """Small models beside one target: their rule, how a reader of a prompt begins, and their threads."""

    rule: Rule | JointRule
    begin: Callable[[str], Any]
    workers: list[SmallWorker]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("other") / "small", vocab_size=330, seed=4)


def made(kind: str, base: Path, target: Path, remote: Any, folder: Path) -> Small:
    aligned = bridged({"exact": "bridge-exact", "path": "path"}.get(kind, "bridge"), Vocabulary.from_hf(remote), vocabulary(base))
    assert isinstance(aligned.alignment, Bridging)
    rules, members = [RULE], [likeness(base)]
    scorers: list[Any] = [Scorer(members[0], threshold=RULE.margin)]
    if kind == "pair":
        rules = [Rule(alpha=1.0, margin=0.3, method="offset", tail="complete")]
        artifact = load_artifact(save_pair(folder / "pair", base, "lora", gated=True, noise=0.2))
        scorers = [artifact.scorer(threshold=rules[0].margin)]
    if kind == "two assistants":
        rules.append(Rule(alpha=1.5, margin=2.0, filter=0.1))
        scorers.append(Scorer(turned(members[0]), threshold=2.0))
    worker = SmallWorker(TreeScorer(scorers, masks=False if kind == "assistant without masks" else None))
    workers, tokenizer = [worker], members[0].tokenizer
    if kind == "two bases":
        rules.append(RULE)
        workers.append(SmallWorker(Scorer(likeness(target), threshold=RULE.margin)))

    def begin(prompt: str) -> Any:
        own = render_as_trained(tokenizer, prompt, chat_template=True)
        parts: list[Any] = [
            BridgeReader(worker, aligned.alignment, rule, own, worker.scorer.track(at)) for at, rule in enumerate(rules[: len(scorers)])
        ]
        parts += [Reader(other, Identity(), render(remote, prompt), other.scorer.track()) for other in workers[1:]]
        return JointReader(tuple(parts)) if len(parts) > 1 else parts[0]

    return Small(JointRule(tuple(rules)) if len(rules) > 1 else rules[0], begin, workers)


def vocabulary(folder: Path) -> Vocabulary:
    from transformers import AutoTokenizer

    return Vocabulary.from_hf(AutoTokenizer.from_pretrained(folder))


def turned(model: SmallModel) -> SmallModel:
    """The same model with a gate that opens at other prefixes."""
    assert model.gate is not None
    gate = type(model.gate)(model.gate.weight.shape[0], bias=-0.5)
    with torch.no_grad():
        gate.weight.copy_(-model.gate.weight)
    return replace(model, gate=gate.requires_grad_(False))


async def answered(backend: Any, small: Small, prompt: str, *, draft: str | int, **more: Any) -> tuple[Result, Watched]:
    settings = Settings(small.rule, Sampling(), Mode.GREEDY, LENGTH, draft=draft, assistants=("one", "two"), max_retries=9, **more)
    reader = Watched(small.begin(prompt))
    ends = end_token_ids(backend.tokenizer)
    run = Answer(backend, await backend.probe(), settings, render(backend.tokenizer, prompt), ends, reader=reader)  # type: ignore[arg-type]
    result = [piece async for piece in run.run()][-1].result
    assert result is not None
    return result, reader


def alike(found: Any, slow: Any, ids: np.ndarray) -> bool:
    """Compare two readings of one position; whether they tell of anything touched."""
    if hasattr(found, "parts"):
        return any([alike(*parts, ids) for parts in zip(found.parts, slow.parts, strict=True)])
    if not isinstance(found, BridgedReading):
        np.testing.assert_allclose(found.excess(), slow.excess(), atol=1e-3)
        return bool(found.peak > RULE.margin)
    assert (found.place, found.at, found.quiet, found.beyond is None) == (slow.place, slow.at, slow.quiet, slow.beyond is None)
    np.testing.assert_allclose(found.peak, slow.peak, atol=1e-3)
    assert (found.values is None) == (slow.values is None)
    if found.values is None or slow.values is None:
        return False
    np.testing.assert_allclose(found.values[:, ids], slow.values[:, ids], atol=2e-3)
    return not found.quiet


@pytest.mark.parametrize("kind", KINDS)
async def test_a_draft_is_read_as_its_positions_are(
    kind: str, base: Path, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    backend = create_backend("hf", model=str(tiny_target), top_logprobs=K)
    small = made(kind, base, tiny_target, backend.tokenizer, tmp_path)
    touched = broken = changed = 0
    for number, prompt in enumerate(PROMPTS[:3]):
        answers = set()
        for draft in ("stream", 1, 9):
            pieces: Any = InPieces(backend, seed=number)
            result, reader = await answered(pieces, small, prompt, draft=draft)
            answers.add((result.token_ids, result.report.untouched, result.report.exact))
            broken += pieces.broken
            changed += result.report.changed
        assert len(answers) == 1
        for position, (top, also, reading) in reader.seen.items():
            slow = small.begin(prompt)
            slow.prime(result.token_ids[:position])
            await slow.primed()
            alone = slow.next(position)
            await slow.informed(alone, position, top, also=also)
            touched += alike(reading, alone, top.ids)
        assert sorted(reader.seen) == list(range(result.report.positions))
    assert touched > 12
    assert broken
    assert changed
    for worker in small.workers:
        worker.close()
    await backend.aclose()


async def test_a_refusal_comes_at_the_same_position(base: Path, tiny_target: Path, tmp_path: Path) -> None:
    backend = create_backend("hf", model=str(tiny_target), top_logprobs=K)
    small = made("assistant", base, tiny_target, backend.tokenizer, tmp_path)
    for prompt in PROMPTS:
        results = [
            (await answered(backend, small, prompt, draft=draft, on_touched="refuse", refusal="No."))[0] for draft in ("stream", 1, 5)
        ]
        assert len({(result.text, result.report.positions, result.finish_reason) for result in results}) == 1
    assert results[0].finish_reason == "refusal"
    small.workers[0].close()
    await backend.aclose()


async def test_a_draft_is_read_as_far_as_there_is_room(base: Path, tiny_target: Path, tmp_path: Path) -> None:
    """A draft that the small model cannot read whole fails where its context ends, and not before."""
    backend = create_backend("hf", model=str(tiny_target), top_logprobs=K)
    small = made("two assistants", base, tiny_target, backend.tokenizer, tmp_path)
    prompt = render(backend.tokenizer, PROMPTS[0])
    draft = await backend.draft(prompt, 16, ServerSampling())
    tokens, tops = list(draft.tokens), list(draft.positions)

    async def reached(size: int, room: Sequence[int]) -> int:
        reader = small.begin(PROMPTS[0])
        for part, more in zip(reader.parts, room, strict=True):
            part.context = len(part.prompt) + LONGEST_PATH + more
        count = 0

        async def read_all() -> None:
            nonlocal count
            while count < len(tokens):
                reader.prime(tokens[:count])
                await reader.primed()
                piece = slice(count, count + size)
                reader.told(count, tokens[piece], tops[piece])
                for top in tops[piece]:
                    if not reader.ready:
                        await reader.read_on()
                    await reader.informed(reader.next(count), count, top)
                    count += 1

        with pytest.raises(ContextExceeded, match="of the assistant's own tokens"):
            await read_all()
        return count

    for room in ((4, 4), (4, 7), (7, 4), (9, 9)):
        found = [await reached(size, room) for size in (1, 5, 16)]
        assert len(set(found)) == 1
        assert 1 < found[0] < len(tokens)
    small.workers[0].close()
    await backend.aclose()
