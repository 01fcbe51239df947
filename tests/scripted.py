"""A chat server that answers from a script: it counts what it is asked, and how many requests it holds at a time."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.errors import RequestRejected
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs

Script = Callable[[str, int], str]


class Scripted:
    """A Backend whose every token is certain. `script` makes a reply of a prompt and how often it was asked before.

    After `fails_after` replies it refuses every request.
    """

    name = "scripted"

    def __init__(self, tokenizer: Any, script: Script, *, model: str = "script", fails_after: int | None = None) -> None:
        self._tokenizer, self.script, self.model, self.fails_after = tokenizer, script, model, fails_after
        self.asked: Counter[str] = Counter()
        self.now = self.most = 0

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    async def probe(self) -> Capabilities:
        return Capabilities(self.model, 1)

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = ServerSampling()) -> AsyncGenerator[Draft]:
        prompt = self._tokenizer.decode(list(prefix)).split("<|user|>")[1].split("<|assistant|>")[0]
        if self.fails_after is not None and self.asked.total() >= self.fails_after:
            raise RequestRejected("the script has ended")
        turn = self.asked[prompt]
        self.asked[prompt] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.002)
            ids = [*self._tokenizer.encode(self.script(prompt, turn), add_special_tokens=False), self._tokenizer.eos_token_id]
            finish = FinishReason.STOP if len(ids) <= n else FinishReason.LENGTH
            yield Draft(tuple(ids[:n]), tuple(TopLogprobs.build([token], [0.0]) for token in ids[:n]), finish)
        finally:
            self.now -= 1

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling = ServerSampling()) -> Draft:
        raise NotImplementedError

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        raise NotImplementedError

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        return prefix

    async def aclose(self) -> None:
        """Nothing is open."""
