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
from uld_offset_models.shift import Rule
from uld_offset_models.tree_scorer import TreeScorer
from uld_sdk.aligning import bridged
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reader import BridgeReader
from uld_sdk.bridge_reading import Bridging
from uld_sdk.generation import Answer
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


async def counted(target: Path, small: SmallModel, prompt: str, *, draft: int, margin: float) -> tuple[Result, int, int]:
    """The answer, how many drafts it took, and how often the small model ran."""
    rule = Rule(alpha=3.0, margin=margin)
    backend: Any = InOnePiece(create_backend("hf", model=str(target), top_logprobs=K))
    aligned = bridged("bridge", Vocabulary.from_hf(backend.tokenizer), Vocabulary.from_hf(small.tokenizer))
    assert isinstance(aligned.alignment, Bridging)
    scorer = TreeScorer([Scorer(small, threshold=margin)])
    worker = SmallWorker(scorer)
    reader = BridgeReader(worker, aligned.alignment, rule, render_as_trained(small.tokenizer, prompt, chat_template=True), scorer.track())
    settings = Settings(rule, Sampling(), Mode.GREEDY, LENGTH, draft=draft, alignment="bridge")
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
        result, drafts, passes = await counted(tiny_target, other, prompt, draft=draft, margin=50.0)
        assert result.untouched
        assert drafts == -(-result.report.positions // draft)
        assert passes <= 1 + drafts, "the prompt, and the cover of each draft"


@pytest.mark.parametrize("draft", [1, 4, 8])
async def test_passes_of_touched_drafts_do_not_grow_with_their_positions(tiny_target: Path, other: SmallModel, draft: int) -> None:
    """A draft takes its cover, the candidates of its first position and those of all others; a rewritten token is read by itself."""
    most = 3 if draft > 1 else 2
    touched = 0
    for prompt in PROMPTS:
        result, drafts, passes = await counted(tiny_target, other, prompt, draft=draft, margin=1.0)
        assert passes <= 1 + most * drafts + result.report.changed
        touched += result.report.positions - result.report.untouched
    assert touched > len(PROMPTS) * 4
