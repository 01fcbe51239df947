"""One small model for many answers at once: requests that wait together go through it in one batched pass."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class SmallWorker:
    """Runs a `Scorer` in a thread of its own; whatever is asked for while it is busy becomes its next batch."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer
        self._waiting: list[tuple[Any, Any, bool, asyncio.Future[Any]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uld-small")
        self._busy: asyncio.Task[None] | None = None
        self.passes = 0

    async def read(self, track: Any, tokens: Any, *, every: bool = True) -> list[Any]:
        """A Reading after each of the new tokens (only after the last one: every=False); a tree's scorer takes chain and paths."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((track, tokens, every, future))
        if self._busy is None or self._busy.done():
            self._busy = asyncio.create_task(self._drain())
        readings: list[Any] = await future
        return readings

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            # A long prompt beside a single token would be mostly padding: what is asked in one kind goes together.
            every = self._waiting[0][2]
            batch = [job for job in self._waiting if job[2] == every]
            self._waiting = [job for job in self._waiting if job[2] != every]
            jobs = [(track, tokens) for track, tokens, _, future in batch if not future.cancelled()]
            live = [future for *_, future in batch if not future.cancelled()]
            if not jobs:
                continue
            self.passes += 1
            try:
                answers = await loop.run_in_executor(self._thread, lambda j=jobs, e=every: self.scorer.read(j, every=e))  # type: ignore[misc]
            except Exception as error:
                for future in live:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, answer in zip(live, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)
