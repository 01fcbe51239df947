"""The decode loop: drafts come in, what stands goes out. Everything that waits is here; what decides is in verify.py."""

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from uld_adapters.backend import Backend, Capabilities, ServerSampling
from uld_adapters.errors import BackendError, MalformedAnswer, RequestRejected
from uld_adapters.http import TALLY, Tally, seconds_before_retry
from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Rule
from uld_sdk.arrivals import arriving
from uld_sdk.pace import Pace
from uld_sdk.reading import Reader
from uld_sdk.result import Piece, Report, Result, Step, Usage
from uld_sdk.sampling import Sampling
from uld_sdk.text import TextStream
from uld_sdk.verify import Mode, is_touched, judge, stands_unseen

DRAFT_GREEDY = ServerSampling()


@dataclass(frozen=True)
class Settings:
    """What one answer is asked for."""

    rule: Rule
    sampling: Sampling
    mode: Mode
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    draft: str | int = "stream"
    on_touched: Literal["rewrite", "refuse"] = "rewrite"
    refusal: str = ""
    max_retries: int = 4
    trace: bool = False


class Answer:
    """One answer in the making: `run` yields verified pieces and, last, the one that carries the result."""

    def __init__(
        self,
        backend: Backend,
        capabilities: Capabilities,
        settings: Settings,
        prompt: Sequence[int],
        end_ids: frozenset[int],
        *,
        reader: Reader | None = None,
    ) -> None:
        self.backend, self.capabilities, self.settings = backend, capabilities, settings
        self.prompt = list(prompt)
        self.end_ids = end_ids
        self.tokens: list[int] = []
        self.text = TextStream(backend.tokenizer, settings.stop)
        self.reader = reader
        self.report = Report(mode=settings.mode.value, top_logprobs=capabilities.top_logprobs)
        self.steps: list[Step] = []
        self.finish: str | None = None
        self.pace = Pace(settings.draft if capabilities.streams or settings.draft != "stream" else "auto")
        self.start = time.perf_counter()
        self._tally = Tally()
        self._counting = contextvars.copy_context()
        self._counting.run(TALLY.set, self._tally)

    async def run(self) -> AsyncGenerator[Piece]:
        """Drafts until the answer ends; a draft that breaks off is asked for again from what stands."""
        failures = 0
        try:
            while self.finish is None:
                before = len(self.tokens)
                try:
                    async for piece in self._one_request():
                        yield piece
                    failures = 0
                except BackendError as error:
                    failures = 1 if len(self.tokens) > before else failures + 1
                    if not error.retryable or failures > self.settings.max_retries:
                        raise
                    await asyncio.sleep(seconds_before_retry(failures, error))
            yield self._last()
        finally:
            if self.reader is not None:
                await self.reader.aclose()

    async def _one_request(self) -> AsyncGenerator[Piece]:
        settings = self.settings
        prefix = [*self.prompt, *self.tokens]
        if settings.mode is Mode.PASS_THROUGH:
            self._go_on_from(self.backend.resume(prefix))
            prefix = [*self.prompt, *self.tokens]
        asked = self.pace.ask(settings.max_new_tokens - len(self.tokens))
        sampling = settings.sampling.for_server if settings.mode is Mode.PASS_THROUGH else DRAFT_GREEDY
        start_length = len(self.tokens)
        rejected = False
        if self.reader is not None:
            self.reader.prime(self.tokens)
        async with arriving(self.backend.stream(prefix, asked, sampling), self._counting) as arrivals:
            ended = False
            while not ended and self.finish is None and not rejected:
                arrived = await arrivals.take()
                self.report.seconds_server += arrived.seconds
                ended = arrived.ended
                async for piece, wrong in self._verify(arrived.tokens, arrived.positions):
                    rejected = wrong
                    if piece is not None:
                        yield piece
                if self.finish is not None or rejected:
                    break
                if arrived.error is not None:
                    raise arrived.error
                if arrived.stopped and self.tokens:
                    self.end_ids = self.end_ids | {self.tokens[-1]}  # the server ends answers with a token that nobody named
                    self.finish = "stop"
        self.pace.saw(len(self.tokens) - start_length - rejected, rejected=rejected)
        if ended and len(self.tokens) == start_length and self.finish is None:
            raise MalformedAnswer("the server ended its answer without writing anything")

    async def _verify(self, tokens: list[int], positions: list[TopLogprobs]) -> AsyncGenerator[tuple[Piece | None, bool]]:
        """Judge drafted tokens in order, reading ahead with the small model in as few passes as can be."""
        self.report.drafted += len(tokens)
        if self.reader is not None:
            await self.reader.primed()
        for at, (token, top) in enumerate(zip(tokens, positions, strict=True)):
            reading = None
            if self.reader is not None:
                if not self.reader.ready:
                    await self.reader.read([*self.tokens[self.reader.fed :], *tokens[at:]])
                reading = self.reader.ready.popleft()
            piece, stands = await self._decide(token, top, reading)
            yield piece, not stands
            if not stands or self.finish is not None:
                return

    async def _decide(self, drafted: int, top: TopLogprobs, reading: Any) -> tuple[Piece | None, bool]:
        settings, report = self.settings, self.report
        touched = is_touched(reading, settings.rule)
        if touched and settings.on_touched == "refuse":
            report.positions += 1
            self.finish = "refusal"
            return None, False
        chosen, exact, bound = drafted, True, 0.0
        if not stands_unseen(reading, settings.rule, settings.mode):
            if settings.mode is Mode.PASS_THROUGH and self.capabilities.processed:
                top = await self._raw_report()
            verdict = judge(top, reading, settings.rule, settings.sampling, settings.mode, len(self.tokens))
            exact, bound = verdict.exact, verdict.bound
            chosen = self._choose(verdict.ranking, drafted)
            if chosen != verdict.token:  # a better token cannot be sent back as text
                exact, bound = False, 1.0
        report.positions += 1
        report.untouched += not touched
        report.exact += exact
        report.largest_bound = max(report.largest_bound, bound)
        changed = touched and chosen != drafted
        report.changed += changed
        if settings.trace:
            words = [self.backend.tokenizer.decode([t]) for t in (chosen, drafted)]
            peak, gate = (None, None) if reading is None else (reading.peak, reading.gate)
            self.steps.append(Step(chosen, words[0], drafted, words[1], gate, peak, touched, changed, exact))
        stands = chosen == drafted
        report.accepted += stands
        return self._emit(chosen, stands=stands), stands

    def _choose(self, ranking: Sequence[int], drafted: int) -> int:
        """The best token after which the server can go on; the one that it drafted itself always is."""
        for token in ranking:
            if token == drafted or self._sendable(token):
                return token
        raise RequestRejected(
            "no token that may stand here can be sent back to this server as text",
            hint="use a server that takes token ids, or a larger top_logprobs",
        )

    def _sendable(self, token: int) -> bool:
        """Whether the server can go on after this token; the prompt's own split must survive."""
        prefix = [*self.prompt, *self.tokens, token]
        if token in self.end_ids:
            return True
        resumed = self.backend.resume(prefix)
        return resumed is not None and list(resumed[: len(self.prompt)]) == self.prompt

    async def _raw_report(self) -> TopLogprobs:
        """The raw top k of the next position, from a server whose sampled report is processed: one greedy token."""
        start = time.perf_counter()
        asked = self.backend.draft([*self.prompt, *self.tokens], 1)
        draft = await asyncio.create_task(asked, context=self._counting)
        self.report.seconds_server += time.perf_counter() - start
        if not draft.positions:
            raise MalformedAnswer("the server wrote nothing where a token was asked for")
        return draft.positions[0]

    def _emit(self, token: int, *, stands: bool) -> Piece:
        if self.report.seconds_first_token is None:
            self.report.seconds_first_token = time.perf_counter() - self.start
        self.tokens.append(token)
        text = self.text.push(token)
        if not stands:
            if self.reader is not None:
                self.reader.rollback(len(self.tokens) - 1)
            if token not in self.end_ids:
                self._go_on_from(self.backend.resume([*self.prompt, *self.tokens]))
        if token in self.end_ids or self.text.stopped is not None:
            self.finish = "stop"
        elif len(self.tokens) >= self.settings.max_new_tokens:
            self.finish = "length"
        return Piece(text, (token,))

    def _go_on_from(self, resumed: Sequence[int] | None) -> None:
        """Adopt the split of the text that the server will see; caches go back to the last id that both have."""
        if resumed is None or list(resumed) == [*self.prompt, *self.tokens]:
            return
        answer = list(resumed[len(self.prompt) :])
        common = next((i for i, (a, b) in enumerate(zip(answer, self.tokens, strict=False)) if a != b), min(len(answer), len(self.tokens)))
        self.report.retokenised += 1
        self.tokens = answer
        self.text.resplit(answer)
        if self.reader is not None:
            self.reader.rollback(common)

    def _last(self) -> Piece:
        self.report.requests = self._tally.requests
        self.report.seconds_total = time.perf_counter() - self.start
        if self.reader is not None:
            self.report.seconds_small = self.reader.seconds
        self.report.trace = tuple(self.steps)
        refused = self.finish == "refusal"
        rest = self.settings.refusal if refused else self.text.finish()
        result = Result(
            text=self.settings.refusal if refused else self.text.released,
            token_ids=() if refused else tuple(self.tokens),
            finish_reason=str(self.finish),
            usage=Usage(len(self.prompt), len(self.tokens)),
            report=self.report,
            stop_sequence=self.text.stopped,
        )
        return Piece(rest, (), result.finish_reason, result, replaces=refused)
