"""UnlearnedClient: the asynchronous client, driven from a thread, with the same signatures."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

from uld_adapters.backend import Capabilities
from uld_adapters.errors import UsageError
from uld_sdk.async_client import AsyncUnlearnedClient
from uld_sdk.keywords import spelled
from uld_sdk.options import Connection, ConnectionKeywords, Generation, GenerationKeywords, ScoreKeywords, Scoring
from uld_sdk.prompts import Message, Prompt
from uld_sdk.result import Piece, Result, ScoreResult

T = TypeVar("T")


class UnlearnedClient:
    """An unlearned view of a remote model, the same as `AsyncUnlearnedClient` without `await`.

    Use it as a context manager, or call `close` when done. One client may be used from several threads.
    """

    @spelled(Connection)
    def __init__(self, **options: Unpack[ConnectionKeywords]) -> None:
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

    @property
    def assistants(self) -> tuple[Path, ...]:
        """The folders of the assistants that the next answer will have."""
        return self._client.assistants

    def add_assistant(self, folder: str | Path, *, base: str | Path | None = None) -> None:
        """Load one more assistant, for the answers that begin from then on; see `AsyncUnlearnedClient.add_assistant`."""
        self._wait(self._client.add_assistant(folder, base=base))

    def remove_assistant(self, folder: str | Path) -> None:
        """Go on without an assistant, likewise."""
        self._wait(self._client.remove_assistant(folder))

    @spelled(Generation)
    def generate(self, prompt: Prompt, **options: Unpack[GenerationKeywords]) -> Result:
        """One answer."""
        return self._wait(self._client.generate(prompt, **options))

    @spelled(Generation)
    def chat(self, messages: Sequence[Message], **options: Unpack[GenerationKeywords]) -> Result:
        """One answer to a conversation."""
        return self._wait(self._client.chat(messages, **options))

    @spelled(Generation)
    def stream(self, prompt: Prompt, **options: Unpack[GenerationKeywords]) -> Iterator[Piece]:
        """Verified pieces as they are ready; leaving the loop cancels the request."""
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

    @spelled(Generation)
    def generate_many(self, prompts: Sequence[Prompt], *, concurrency: int = 8, **options: Unpack[GenerationKeywords]) -> list[Result]:
        """Many answers at once."""
        return self._wait(self._client.generate_many(prompts, concurrency=concurrency, **options))

    @spelled(Scoring)
    def score(self, prompt: Prompt, continuation: str, **options: Unpack[ScoreKeywords]) -> ScoreResult:
        """Log-probability of a given text."""
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
