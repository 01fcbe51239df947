"""Waiting for coroutines: for one, from callers that do not await, and for many, some at a time."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="uld-waiting") as thread:
        return thread.submit(asyncio.run, work).result()


async def all_of(items: Iterable[Item], work: Callable[[Item], Coroutine[Any, Any, T]], *, concurrency: int) -> list[T]:
    """What `work` makes of each item, in order, at most `concurrency` at a time; the first error cancels the rest and is raised."""
    gate = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> T:
        async with gate:
            return await work(item)

    tasks = [asyncio.create_task(one(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
