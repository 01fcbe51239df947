"""A stream that is read while its pieces are being verified."""

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from uld_adapters.logprobs import Draft, FinishReason, TopLogprobs


@dataclass(frozen=True)
class Arrived:
    """What came of a stream after `seconds` of waiting; `stopped` says that the server ended the answer.

    `prompt_tokens` is the server's count, where it told one.
    """

    seconds: float
    tokens: list[int]
    positions: list[TopLogprobs]
    stopped: bool = False
    prompt_tokens: int | None = None
    ended: bool = False
    error: Exception | None = None


class Arrivals:
    """The pieces of a stream in the order they came."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Draft | Exception | None] = asyncio.Queue()

    async def take(self) -> Arrived:
        """Wait for a piece, then take all that has arrived meanwhile."""
        start = time.perf_counter()
        items = [await self.queue.get()]
        seconds = time.perf_counter() - start
        while not self.queue.empty():
            items.append(self.queue.get_nowait())
        tokens: list[int] = []
        positions: list[TopLogprobs] = []
        stopped, counted = False, None
        for item in items:
            if item is None:
                return Arrived(seconds, tokens, positions, stopped, counted, ended=True)
            if isinstance(item, Exception):
                return Arrived(seconds, tokens, positions, error=item)
            tokens.extend(item.tokens)
            positions.extend(item.positions)
            stopped = stopped or item.finish is FinishReason.STOP
            counted = item.prompt_tokens or counted
        return Arrived(seconds, tokens, positions, stopped, counted)


@asynccontextmanager
async def arriving(pieces: AsyncGenerator[Draft], counting: contextvars.Context) -> AsyncIterator[Arrivals]:
    """Read a stream in a task of its own; leaving early closes the connection, which cancels the request.

    The reading runs in the context `counting`, where the requests that it makes are counted.
    """
    arrivals = Arrivals()

    async def pump() -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    arrivals.queue.put_nowait(piece)
            arrivals.queue.put_nowait(None)
        except Exception as error:
            arrivals.queue.put_nowait(error)

    task = asyncio.create_task(pump(), context=counting)
    try:
        yield arrivals
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
