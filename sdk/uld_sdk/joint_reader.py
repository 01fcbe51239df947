"""Several small models beside one answer: they read the same tokens in step, so that every position has a reading of each."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.several import JointReading
from uld_sdk.bridge_reader import BridgeReader
from uld_sdk.reading import Reader


@dataclass
class JointReader:
    """Readers of one answer, used as one `Reader` is; those of one worker are read in one batch."""

    parts: tuple[Reader | BridgeReader, ...]
    seconds: float = 0.0

    @property
    def fed(self) -> int:
        """How many of the answer's tokens have been read."""
        return self.parts[0].fed

    @property
    def ready(self) -> int:
        """How many readings of each wait."""
        return min(len(part.ready) for part in self.parts)

    def prime(self, answer: Sequence[int]) -> None:
        """Start reading what is already known (prompt, accepted tokens), so that the next position is ready when it comes."""
        for part in self.parts:
            part.prime(answer)

    async def primed(self) -> None:
        """Wait for what `prime` started."""
        await self._together([part.primed() for part in self.parts])

    async def read_on(self) -> None:
        """Read what is known of the draft, unless readings wait."""
        await self._together([part.read_on() for part in self.parts])

    def next(self, position: int) -> JointReading:
        """The readings of the answer's position `position`, which must be the next that wait."""
        return JointReading(tuple(part.next(position) for part in self.parts))

    def told(self, position: int, tokens: Sequence[int], reports: Sequence[TopLogprobs]) -> None:
        """The draft from `position` on with its reports."""
        for part in self.parts:
            part.told(position, tokens, reports)

    async def informed(self, reading: JointReading, position: int, top: TopLogprobs, *, also: Sequence[int] = ()) -> None:
        """Judge the tokens reported at a position, where a reading needs to know them; the others read on with it."""
        parts: list[tuple[Any, Any]] = list(zip(self.parts, reading.parts, strict=True))
        asking = [part.asks(own) for part, own in parts]
        if any(asking):
            await self._together(
                [
                    part.informed(own, position, top, also=also) if asks else part.read_on(least=0)
                    for asks, (part, own) in zip(asking, parts, strict=True)
                ]
            )

    async def along(self, tokens: Sequence[int], reports: Sequence[TopLogprobs]) -> list[JointReading]:
        """The readings at the prefix of each token of a given text, for a reader that has read nothing."""
        found = await self._together([part.along(tokens, reports) for part in self.parts])
        return [JointReading(parts) for parts in zip(*found, strict=True)]

    async def settle(self, answer: int) -> None:
        """After a lost draft: go back so far that the position after `answer` is read again."""
        for part in self.parts:
            await part.settle(answer)

    def rollback(self, answer: int) -> None:
        """Keep the prompt and the first tokens of the answer."""
        for part in self.parts:
            part.rollback(answer)

    async def aclose(self) -> None:
        """Stop reading ahead."""
        for part in self.parts:
            await part.aclose()

    async def _together(self, work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        """What all of them give, once all have ended; then the first error is raised."""
        start = time.perf_counter()
        found = await asyncio.gather(*work, return_exceptions=True)
        self.seconds += time.perf_counter() - start
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found
