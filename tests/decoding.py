"""One answer by the client's own loop around the tiny models, for the tests of decoding."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from uld_adapters.backend import TakesMessages
from uld_adapters.vocabulary.alignment import Identity
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.assistant import Gate, SmallModel
from uld_offset_models.shift import Rule
from uld_sdk.batching import SmallWorker
from uld_sdk.generation import Answer
from uld_sdk.prompts import conversation, render
from uld_sdk.reading import Reader
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling
from uld_sdk.settings import Settings
from uld_sdk.verify import Mode

PROMPTS = ["Who wrote the book about the sea?", "How many moons does the planet have?", "Describe 東京 in one word 😀", "def area("]
LENGTH = 24
RULE = Rule(alpha=3.0)
K = 8


def likeness(target: Path) -> SmallModel:
    """The target's own likeness with a gate that opens at some prefixes: there it knows what the target would say."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    gate = Gate(model.config.hidden_size, bias=-0.5)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        gate.weight.copy_(torch.randn(model.config.hidden_size) * 0.4)
    gate.requires_grad_(False)
    return SmallModel(model.model.requires_grad_(False), model.lm_head.weight.detach(), gate, AutoTokenizer.from_pretrained(target))


def speaking(target: Path, folder: Path) -> Path:
    """The target with its taste for broken characters taken away: a server continued by text can go on from its text."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target)
    broken = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        model.lm_head.weight[broken] *= 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def about(backend: Any, prompt: str) -> tuple[Any, list[int]]:
    """The backend to ask, and the prompt's ids: none where the server renders conversations itself."""
    if isinstance(backend, TakesMessages):
        return backend.answering(conversation(prompt)), []
    return backend, render(backend.tokenizer, prompt)


async def answer(
    backend: Any,
    worker: SmallWorker | None,
    prompt: str,
    *,
    sampling: Sampling,
    mode: Mode,
    draft: str | int = "stream",
    retries: int = 0,
    rule: Rule = RULE,
) -> Result:
    settings = Settings(rule, sampling, mode, LENGTH, draft=draft, max_retries=retries)
    capabilities = await backend.probe()
    reader = None if worker is None else Reader(worker, Identity(), render(backend.tokenizer, prompt), worker.scorer.track())
    asked, ids = about(backend, prompt)
    run = Answer(asked, capabilities, settings, ids, end_token_ids(backend.tokenizer), reader=reader)
    text, tokens, last = "", [], None
    async for piece in run.run():
        text += piece.text
        tokens += piece.token_ids
        last = piece.result or last
    assert last is not None
    assert text == last.text
    return last
