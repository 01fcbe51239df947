"""UnlearnedClient: the asynchronous client, driven from a thread, with the same signatures."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Self, TypeVar

from uld_adapters.backend import Capabilities
from uld_adapters.errors import UsageError
from uld_sdk.async_client import AsyncUnlearnedClient
from uld_sdk.prompts import Message, Prompt
from uld_sdk.result import Piece, Result, ScoreResult

T = TypeVar("T")


class UnlearnedClient:
    """An unlearned view of a remote model; keyword arguments as for `AsyncUnlearnedClient`.

    Use it as a context manager, or call `close` when done. One client may be used from several threads.
    """

    def __init__(self, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        try:
            self._client = AsyncUnlearnedClient(**options)
        except BaseException:
            self._loop.close()
            raise
        self._thread = threading.Thread(target=self._loop.run_forever, name="uld-client", daemon=True)
        self._thread.start()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise UsageError("the client is closed", hint="make a new UnlearnedClient")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def capabilities(self) -> Capabilities:
        """What the server was found to do; see `AsyncUnlearnedClient.capabilities`."""
        return self._wait(self._client.capabilities())

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """One answer; see `AsyncUnlearnedClient.generate`."""
        return self._wait(self._client.generate(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Any) -> Result:
        """One answer to a conversation; see `AsyncUnlearnedClient.chat`."""
        return self._wait(self._client.chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Piece]:
        """Verified pieces as they are ready; leaving the loop cancels the request. See `AsyncUnlearnedClient.stream`."""
        pieces = self._client.stream(prompt, **options)
        turn = asyncio.Lock()  # an interrupted wait lets go of the generator a moment after it is cancelled

        async def following() -> Piece | None:
            async with turn:
                return await anext(pieces, None)

        async def close() -> None:
            async with turn:
                await pieces.aclose()

        try:
            while (piece := self._wait(following())) is not None:
                yield piece
        finally:
            if not self._closed:
                self._wait(close())

    def generate_many(self, prompts: Sequence[Prompt], **options: Any) -> list[Result]:
        """Many answers at once; see `AsyncUnlearnedClient.generate_many`."""
        return self._wait(self._client.generate_many(prompts, **options))

    def score(self, prompt: Prompt, continuation: str, **options: Any) -> ScoreResult:
        """Log-probability of a given text; see `AsyncUnlearnedClient.score`."""
        return self._wait(self._client.score(prompt, continuation, **options))

    def close(self) -> None:
        """Close connections and threads; a second call does nothing."""
        if self._closed:
            return
        self._wait(self._client.close())
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
