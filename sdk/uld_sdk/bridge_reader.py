"""The small model beside one answer in other tokens: a tree of its own tokens at each position of the answer."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uld_adapters.errors import ContextExceeded
from uld_adapters.logprobs import TopLogprobs
from uld_adapters.vocabulary.bridge import Path, Place, beginnings
from uld_adapters.vocabulary.shares import Shares
from uld_offset_models.shift import Rule, untouched
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reading import BridgedReading, Bridging
from uld_sdk.certainty import shifted_bound

AHEAD, LIKELY = 6, 0.01  # candidates after which the small model is read on, and the least p_M that they need
LONGEST_PATH = 32  # tokens that may stand beyond the certain ones
AT_ONCE, MOST = 16, 256  # paths read in one pass, and in all, when a bound is too wide
LIGHTEST = 1e-9  # mass of a position that is never looked at by itself
LARGE, LIGHTEST_OF_LARGE = 5000, 2e-5  # tokens of a vocabulary so large that lighter ones would take minutes a position
Missing = tuple[BridgedReading, Sequence[Path]]


@dataclass
class BridgeReader:
    """Reads along an answer whose tokens are the remote's: the same as `Reader`, with a tree at each position.

    `prompt` is the small model's own rendering, and the answer begins a new text; or `begun` is a text that the answer continues,
    and the prompt what stands before it. Of the answer the track holds the tokens that are
    certain whatever follows; what is open is read as branches below them.
    """

    worker: SmallWorker
    bridging: Bridging
    rule: Rule
    prompt: Sequence[int]
    track: Any
    begun: bytes | None = None
    context: int | None = None
    ready: deque[BridgedReading] = field(default_factory=deque)
    task: asyncio.Task[list[BridgedReading]] | None = None
    seconds: float = 0.0
    _tokens: list[int] = field(default_factory=list)
    _places: list[tuple[int, Place]] = field(default_factory=list)
    _told: dict[int, tuple[int, TopLogprobs]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weighing = self.bridging.weighing
        certain, place = ((), weighing.start()) if self.begun is None else weighing.begin(self.begun)
        self.prompt = [*self.prompt, *certain]
        self._places = [(len(self.prompt), place)]

    @property
    def fed(self) -> int:
        """How many of the answer's tokens have been read."""
        return len(self._tokens)

    def prime(self, answer: Sequence[int]) -> None:
        """Start reading what is already known (prompt, accepted tokens), so that the next position is ready when it comes."""
        if self.ready or self.task is not None:
            return
        self.task = asyncio.create_task(self._read(answer[self.fed :], last=True))

    async def primed(self) -> None:
        """Wait for what `prime` started."""
        if self.task is not None:
            task, self.task = self.task, None
            start = time.perf_counter()
            self.ready.extend(await task)
            self.seconds += time.perf_counter() - start

    async def read(self, tokens: Sequence[int]) -> None:
        """Read the answer's next tokens; each gives a reading of the position after it."""
        start = time.perf_counter()
        self.ready.extend(await self._read(tokens))
        self.seconds += time.perf_counter() - start

    async def read_on(self, *, least: int = 1) -> None:
        """Read what is known of the draft, unless readings wait: as much as there is room for, and no fewer tokens than `least`."""
        if not self.ready:
            start = time.perf_counter()
            self.ready.extend(await self._read(self._unread(), least=least))
            self.seconds += time.perf_counter() - start

    def _unread(self) -> list[int]:
        return [token for position, (token, _) in self._told.items() if position >= self.fed]

    async def _read(
        self, tokens: Sequence[int], *, here: bool = False, last: bool = False, least: float = np.inf, besides: Sequence[Missing] = ()
    ) -> list[BridgedReading]:
        """The readings after each of the answer's next tokens, `here` with the one before them, or after the `last` alone.

        In the same pass paths `besides` of earlier readings are read.

        Raises `ContextExceeded` where there is no room for as many tokens as `least`.
        """
        weighing, first = self.bridging.weighing, not self.track.tokens
        chain, places = self._steps(tokens)
        if len(places) < min(least, len(tokens)) or not self._fits(self._places[-1][0]):
            raise ContextExceeded(
                f"the answer takes more than {(self.context or 0) - LONGEST_PATH} of the assistant's own tokens, with the prompt",
                hint="shorten the prompt or lower max_new_tokens: the assistant's tokens are shorter than the large model's",
            )
        known = [self._places[-1], *places]
        asked = known[-1:] if last else known[not here :]
        paths = {(at, path) for at, place in asked for path in weighing.cover(place)}
        paths |= {(reading.at, path) for reading, missing in besides for path in missing}
        if not paths:
            return []
        chain = [*self.prompt, *chain] if first else chain
        found: Any = await self.worker.read(self.track, (chain, sorted(paths)), every=here or not first)
        self._tokens += tokens[: len(places)]
        self._places += places
        for reading, missing in besides:
            reading.nodes |= {path: found[reading.at, path] for path in missing}
        return [
            BridgedReading(self.bridging, self.rule, at, place, {path: found[at, path] for path in weighing.cover(place)})
            for at, place in asked
        ]

    def _steps(self, tokens: Sequence[int]) -> tuple[list[int], list[tuple[int, Place]]]:
        """The small model's tokens that the answer's next ones make certain, and the place after each of these, while there is room."""
        chain: list[int] = []
        places: list[tuple[int, Place]] = []
        length, place = self._places[-1]
        for token in tokens:
            certain, place = self.bridging.weighing.step(place, token)
            length += len(certain)
            if not self._fits(length):
                break
            chain += certain
            places.append((length, place))
        return chain, places

    def _fits(self, length: int) -> bool:
        return self.context is None or length + LONGEST_PATH <= self.context

    def next(self, position: int) -> BridgedReading:
        """The reading of the answer's position `position`, which must be the next that waits."""
        first = self.fed - len(self.ready) + 1
        if first != position:
            raise RuntimeError(f"the small model's next reading is of position {first}, not {position}")
        return self.ready.popleft()

    def told(self, position: int, tokens: Sequence[int], reports: Sequence[TopLogprobs]) -> None:
        """The draft from `position` on with its reports: what is to be read of it is read in as few passes as can be."""
        self._told = {position + number: each for number, each in enumerate(zip(tokens, reports, strict=True))}

    def asks(self, reading: BridgedReading) -> bool:
        """Whether it takes the reported tokens to tell what is moved."""
        return not untouched(reading.peak, self.rule)

    async def along(self, tokens: Sequence[int], reports: Sequence[TopLogprobs]) -> list[BridgedReading]:
        """The readings at the prefix of each token of a given text with its reports, for a reader that has read nothing."""
        try:
            readings = await self._read(tokens[:-1], here=True)
            touched = [at for at, reading in enumerate(readings) if self.asks(reading)]
            await self._settle([(readings[at], reports[at], tokens[at : at + 1]) for at in touched])
            return readings
        finally:
            await self.aclose()

    async def informed(self, reading: BridgedReading, position: int, top: TopLogprobs, *, also: Sequence[int] = ()) -> None:
        """Judge the tokens reported at a position, and with it those of the touched positions after it that are known already.

        Where none is known yet, a pass reads the rest of the draft, too, even if nothing else is to be read: others do so in step.
        """
        known = reading.values is not None and not also and position in self._told and self._told[position][1] is top
        if known or not self.asks(reading):
            return
        start = time.perf_counter()
        waiting = [(reading, top, list(also))]
        for number, later in enumerate(self.ready, start=position + 1):
            if number in self._told and later.values is None and self.asks(later):
                waiting.append((later, self._told[number][1], []))
        await self._settle(waiting, on=[] if self.ready else self._unread())
        self.seconds += time.perf_counter() - start

    async def _settle(self, waiting: Sequence[tuple[BridgedReading, TopLogprobs, Sequence[int]]], *, on: Sequence[int] = ()) -> None:
        asked: list[tuple[BridgedReading, TopLogprobs, list[int]]] = []
        besides: list[Missing] = []
        for reading, top, also in waiting:
            ids = [token for token in dict.fromkeys([*top.ids.tolist(), *also]) if token < self.bridging.rows]
            ahead = [token for token, value in zip(top.ids.tolist(), top.logprobs, strict=True) if value > np.log(LIKELY)][:AHEAD]
            asked.append((reading, top, ids))
            if missing := reading.missing(ids, [token for token in ahead if token < self.bridging.rows]):
                besides.append((reading, missing))
        if besides or on:
            self.ready.extend(await self._read(on, least=0, besides=besides))
        for reading, top, ids in asked:
            shares = reading.settle(ids)
            if self.bridging.exact:
                await self._narrow(reading, ids, top, shares)

    async def _narrow(self, reading: BridgedReading, ids: list[int], top: TopLogprobs, shares: Shares) -> None:
        """Open the heaviest leaves, and look at lighter ones, until the bound is within the tolerance or too many have been read."""
        opened, lightest = 0, LIGHTEST if reading.width < LARGE else LIGHTEST_OF_LARGE
        while opened < MOST and reading.least > lightest and self._bound(reading, top) > self.bridging.tolerance:
            wanted = beginnings(path for weight, path in shares.open[:AT_ONCE] if weight > reading.least)
            if not wanted:
                reading.least /= 10
                wanted = reading.missing(ids)[: MOST - opened]
            further = [path for path in wanted if path not in reading.nodes]
            opened += len(further)
            await self._read((), besides=[(reading, further)])
            shares = reading.settle(ids)

    def _bound(self, reading: BridgedReading, top: TopLogprobs) -> float:
        ends = self.rule.bounds(reading)
        return 0.0 if ends is None else shifted_bound(top, ends, self.rule.shift(reading), self.rule.filter)

    async def settle(self, answer: int) -> None:
        """After a lost draft: let a pass under way end, and go back so far that the position after `answer` is read again."""
        if self.task is not None:
            task, self.task = self.task, None
            await asyncio.gather(task, return_exceptions=True)
        self._back(min(answer, self.fed) - 1)

    def rollback(self, answer: int) -> None:
        """Keep the prompt and the first tokens of the answer."""
        self._back(min(answer, self.fed))

    def _back(self, count: int) -> None:
        self.ready.clear()
        self._told = {}
        if count < 0:
            self.track.rollback(0)
            count = 0
        self._tokens = self._tokens[:count]
        self._places = self._places[: count + 1]
        self.track.rollback(min(len(self.track.tokens), self._places[-1][0]))

    async def aclose(self) -> None:
        """Stop reading ahead."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
