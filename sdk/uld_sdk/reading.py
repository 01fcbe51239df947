"""The small model beside one answer: what it has read, what it is reading ahead, and its readings in the target's tokens."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from uld_adapters.logprobs import TopLogprobs
from uld_adapters.vocabulary.alignment import Alignment
from uld_sdk.batching import SmallWorker


@dataclass(frozen=True)
class AlignedReading:
    """A reading whose values are told for the target's token ids."""

    inner: Any
    alignment: Alignment
    beyond: ClassVar[None] = None  # what it says of a prefix holds for the whole vocabulary

    @property
    def peak(self) -> float:
        """The largest excess in nats, of a pair the largest size of a change, or an upper bound of it."""
        return float(self.inner.peak)

    @property
    def gate(self) -> float | None:
        """c(x), None without a gate."""
        return None if self.inner.gate is None else float(self.inner.gate)

    def bounds(self) -> None:
        """The values are exact."""

    def excess(self) -> np.ndarray:
        """Log p_a(y|x) - log u(y), of a pair c (log p_o'(y|x) - log p_o(y|x)), in nats by the target's ids, shape (rows,)."""
        pair = getattr(self.inner, "logprobs", None)
        if pair is None:
            return self.alignment.read(self.inner.excess())
        tuned, frozen = (self.alignment.logprobs(row) for row in pair())
        change = np.subtract(tuned, frozen, out=np.zeros(len(frozen)), where=np.isfinite(frozen))
        return change if self.gate is None else self.gate * change

    def frozen(self) -> np.ndarray:
        """Log p_o(y|x) of a pair's frozen model in nats by the target's ids, shape (rows,)."""
        return self.alignment.logprobs(self.inner.frozen())


@dataclass
class Reader:
    """Plan, score and read of a token's journey: ids are planned by the alignment, scored by the worker, read as excess.

    `prompt` is the small model's own rendering; `track` holds what it has read. Readings wait in `ready`, one a position.
    """

    worker: SmallWorker
    alignment: Alignment
    prompt: Sequence[int]
    track: Any
    ready: deque[AlignedReading] = field(default_factory=deque)
    task: asyncio.Task[list[Any]] | None = None
    seconds: float = 0.0
    _told: tuple[int, Sequence[int]] = (0, ())

    @property
    def fed(self) -> int:
        """How many of the answer's tokens have been read."""
        return max(0, len(self.track.tokens) - len(self.prompt))

    def prime(self, answer: Sequence[int]) -> None:
        """Start reading what is already known (prompt, accepted tokens), so that the next position is ready when it comes."""
        if self.ready or self.task is not None:
            return
        new = [*self.prompt, *self.alignment.plan(answer)] if not self.track.tokens else self.alignment.plan(answer[self.fed :])
        self.task = asyncio.create_task(self.worker.read(self.track, new, every=False))

    async def primed(self) -> None:
        """Wait for what `prime` started."""
        if self.task is not None:
            task, self.task = self.task, None
            start = time.perf_counter()
            self._keep(await task)
            self.seconds += time.perf_counter() - start

    async def read(self, tokens: Sequence[int]) -> None:
        """Read the answer's next tokens; each gives a reading of the position after it."""
        start = time.perf_counter()
        self._keep(await self.worker.read(self.track, self.alignment.plan(tokens)))
        self.seconds += time.perf_counter() - start

    def told(self, position: int, tokens: Sequence[int], reports: Sequence[TopLogprobs]) -> None:
        """The draft from `position` on; what was reported of it makes no difference: a reading tells of the whole vocabulary."""
        self._told = (position, tokens)

    async def read_on(self, *, least: int = 1) -> None:
        """Read what is known of the draft, unless readings wait."""
        position, tokens = self._told
        if not self.ready and self.fed < position + len(tokens):
            await self.read(tokens[self.fed - position :])

    def asks(self, reading: AlignedReading) -> bool:
        """Whether it takes the reported tokens to tell what is moved: never."""
        return False

    async def informed(self, reading: AlignedReading, position: int, top: TopLogprobs, *, also: Sequence[int] = ()) -> None:
        """What the remote reported makes no difference."""

    def next(self, position: int) -> AlignedReading:
        """The reading of the answer's position `position`, which must be the next that waits."""
        first = self.fed - len(self.ready) + 1
        if first != position:
            raise RuntimeError(f"the small model's next reading is of position {first}, not {position}")
        return self.ready.popleft()

    async def along(self, tokens: Sequence[int], reports: Sequence[TopLogprobs]) -> list[AlignedReading]:
        """The readings at the prefix of each token of a given text, for a reader that has read nothing."""
        try:
            self.prime([])
            await self.primed()
            if len(tokens) > 1:
                await self.read(tokens[:-1])
            return list(self.ready)
        finally:
            await self.aclose()

    async def settle(self, answer: int) -> None:
        """After a lost draft: let a pass under way end, and go back so far that the position after `answer` is read again."""
        if self.task is not None:
            task, self.task = self.task, None
            await asyncio.gather(task, return_exceptions=True)
        self.ready.clear()
        last = min(answer, self.fed) - 1
        self.track.rollback(len(self.prompt) + last if last >= 0 else 0)

    def _keep(self, readings: Sequence[Any]) -> None:
        self.ready.extend(AlignedReading(reading, self.alignment) for reading in readings)

    def rollback(self, answer: int) -> None:
        """Keep the prompt and the first tokens of the answer."""
        self.ready.clear()
        self.track.rollback(len(self.prompt) + min(answer, self.fed))

    async def aclose(self) -> None:
        """Stop reading ahead."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
