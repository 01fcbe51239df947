"""How often the small model runs for an answer of other tokens: by drafts and not by tokens."""

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from decoding import LENGTH, PROMPTS, K, likeness
from uld_adapters.backend import ServerSampling
from uld_adapters.logprobs import Draft
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import Vocabulary, end_token_ids
from uld_offset_models.assistant import SmallModel
from uld_offset_models.scorer import Scorer
from uld_offset_models.several import JointRule
from uld_offset_models.shift import Rule
from uld_offset_models.tree_scorer import TreeScorer
from uld_sdk.aligning import bridged
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reader import BridgeReader
from uld_sdk.bridge_reading import Bridging
from uld_sdk.generation import Answer
from uld_sdk.joint_reader import JointReader
from uld_sdk.prompts import render, render_as_trained
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling
from uld_sdk.settings import Settings
from uld_sdk.verify import Mode


class InOnePiece:
    """A backend whose streams arrive at once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.drafts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling) -> AsyncGenerator[Draft]:
        self.drafts += 1
        yield await self._inner.draft(prefix, n, sampling)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return likeness(tiny.tiny_model(tmp_path_factory.mktemp("other") / "small", vocab_size=330, seed=4))


async def counted(target: Path, small: SmallModel, prompt: str, *, draft: int, margins: Sequence[float]) -> tuple[Result, int, int]:
    """The answer, how many drafts it took, and how often the small model ran, for one assistant a margin."""
    rules = [Rule(alpha=3.0, margin=margin) for margin in margins]
    rule = JointRule(tuple(rules)) if len(rules) > 1 else rules[0]
    backend: Any = InOnePiece(create_backend("hf", model=str(target), top_logprobs=K))
    aligned = bridged("bridge", Vocabulary.from_hf(backend.tokenizer), Vocabulary.from_hf(small.tokenizer))
    assert isinstance(aligned.alignment, Bridging)
    scorer = TreeScorer([Scorer(small, threshold=margin) for margin in margins])
    worker = SmallWorker(scorer)
    own = render_as_trained(small.tokenizer, prompt, chat_template=True)
    readers = [BridgeReader(worker, aligned.alignment, each, own, scorer.track(at)) for at, each in enumerate(rules)]
    reader = JointReader(tuple(readers)) if len(readers) > 1 else readers[0]
    settings = Settings(rule, Sampling(), Mode.GREEDY, LENGTH, draft=draft, alignment="bridge", assistants=("one", "two")[: len(rules)])
    ends = end_token_ids(backend.tokenizer)
    run = Answer(backend, await backend.probe(), settings, render(backend.tokenizer, prompt), ends, reader=reader)
    result = [piece async for piece in run.run()][-1].result
    worker.close()
    await backend.aclose()
    assert result is not None
    return result, backend.drafts, sum(tree.passes for tree in scorer.trees.values())


@pytest.mark.parametrize("draft", [1, 4, 8])
async def test_an_untouched_draft_takes_one_pass(tiny_target: Path, other: SmallModel, draft: int) -> None:
    for prompt in PROMPTS:
        result, drafts, passes = await counted(tiny_target, other, prompt, draft=draft, margins=[50.0])
        assert result.untouched
        assert drafts == -(-result.report.positions // draft)
        assert passes <= 1 + drafts, "the prompt, and the cover of each draft"


@pytest.mark.parametrize("margins", [[1.0], [1.0, 50.0], [50.0, 1.0]])
@pytest.mark.parametrize("draft", [1, 4, 8])
async def test_a_touched_draft_takes_two_passes(tiny_target: Path, other: SmallModel, draft: int, margins: list[float]) -> None:
    """Its first position's candidates with the cover of all others, and then their candidates; a rewritten token is read by itself."""
    most = 2 if draft > 1 else 1
    touched = 0
    for prompt in PROMPTS:
        result, drafts, passes = await counted(tiny_target, other, prompt, draft=draft, margins=margins)
        assert passes <= 1 + most * drafts + result.report.changed
        touched += result.report.positions - result.report.untouched
    assert touched > len(PROMPTS) * 4
