"""The decode loop: drafts come in, what stands goes out. Everything that waits is here; what decides is in verify.py."""

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from uld_adapters.backend import Backend, Capabilities, ServerSampling
from uld_adapters.errors import BackendError, MalformedAnswer, RequestRejected
from uld_adapters.http import TALLY, Tally, seconds_before_retry
from uld_adapters.logprobs import TopLogprobs
from uld_sdk.arrivals import arriving
from uld_sdk.bridge_reader import BridgeReader
from uld_sdk.certainty import tail_share, widened
from uld_sdk.continuing import cannot_go_on
from uld_sdk.joint_reader import JointReader
from uld_sdk.pace import MOST, Pace
from uld_sdk.raw_report import raw_report
from uld_sdk.reading import Reader
from uld_sdk.result import Piece, Report, Result, Step, Usage
from uld_sdk.settings import Settings
from uld_sdk.verify import Mode, Verdict, end_stands, judge, stands_unseen, touching
from uld_sdk.written import Written

DRAFT_GREEDY = ServerSampling()


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
        reader: Reader | BridgeReader | JointReader | None = None,
    ) -> None:
        self.backend, self.capabilities, self.settings, self.end_ids = backend, capabilities, settings, end_ids
        self.written = Written(backend.tokenizer, prompt, settings.stop)
        self.reader = reader
        self.report = Report(
            settings.mode.value, settings.alignment, capabilities.top_logprobs, touched_by=dict.fromkeys(settings.assistants, 0)
        )
        self.steps: list[Step] = []
        self.finish: str | None = None
        most = MOST if capabilities.continues else settings.max_new_tokens
        self.pace = Pace(settings.draft if capabilities.streams or settings.draft != "stream" else "auto", most)
        self.start = time.perf_counter()
        self._prompt_tokens: int | None = len(prompt) or None
        self._rewritten = False
        self._tally = Tally()
        self._counting = contextvars.copy_context()
        self._counting.run(TALLY.set, self._tally)

    async def run(self) -> AsyncGenerator[Piece]:
        """Drafts until the answer ends; a draft that breaks off is asked for again from what stands."""
        failures = 0
        try:
            while self.finish is None:
                before = self.report.positions
                try:
                    async for piece in self._one_request():
                        yield piece
                    failures = 0
                except BackendError as error:
                    if self.reader is not None:
                        await self.reader.settle(len(self.written))  # what was read of the lost draft belongs to no position
                    failures = 1 if self.report.positions > before else failures + 1
                    if not error.retryable or failures > self.settings.max_retries:
                        raise
                    await asyncio.sleep(seconds_before_retry(failures, error))
            yield self._last()
        finally:
            if self.reader is not None:
                await self.reader.aclose()

    async def _one_request(self) -> AsyncGenerator[Piece]:
        settings = self.settings
        if self._rewritten and not self.capabilities.continues:
            raise cannot_go_on()
        if settings.mode is Mode.PASS_THROUGH:
            if self.reader is not None:
                await self.reader.primed()  # nothing is being read while the split changes
            self._resume()
        start = self.report.positions
        asked = self.pace.ask(settings.max_new_tokens - start)
        sampling = settings.sampling.for_server if settings.mode is Mode.PASS_THROUGH else DRAFT_GREEDY
        rejected = False
        async with arriving(self.backend.stream(self.written.prefix, asked, sampling), self._counting) as arrivals:
            ended = False
            while not ended and self.finish is None and not rejected:
                if self.reader is not None:
                    self.reader.prime(self.written.tokens)
                arrived = await arrivals.take()
                self.report.seconds_server += arrived.seconds
                ended = arrived.ended
                self._prompt_tokens = self._prompt_tokens or arrived.prompt_tokens
                async for piece, wrong in self._verify(arrived.tokens, arrived.positions):
                    rejected = wrong
                    if piece is not None:
                        yield piece
                if self.finish is not None or rejected:
                    break
                if arrived.error is not None:
                    raise arrived.error
                if arrived.stopped and self.written.tokens:
                    self.end_ids = self.end_ids | {self.written.tokens[-1]}  # the server ends answers with a token that nobody named
                    self.finish = "stop"
        written = self.report.positions - start
        self.pace.saw(written - rejected, rejected=rejected)
        if ended and not written and self.finish is None:
            raise MalformedAnswer("the server ended its answer without writing anything")

    async def _verify(self, tokens: list[int], positions: list[TopLogprobs]) -> AsyncGenerator[tuple[Piece | None, bool]]:
        """Judge drafted tokens in order, reading ahead with the small model in as few passes as can be."""
        self.report.drafted += len(tokens)
        if self.reader is not None and tokens:
            await self.reader.primed()
            self.reader.told(len(self.written), tokens, positions)
        for token, top in zip(tokens, positions, strict=True):
            reading = None
            if self.reader is not None:
                if not self.reader.ready:
                    await self.reader.read_on()
                reading = self.reader.next(len(self.written))
            piece, stands = await self._decide(token, top, reading)
            yield piece, not stands
            if not stands or self.finish is not None:
                return

    async def _decide(self, drafted: int, top: TopLogprobs, reading: Any) -> tuple[Piece | None, bool]:
        settings, report = self.settings, self.report
        await self._inform(reading, top)
        touched = report.count_touching([settings.assistants[place] for place in touching(reading, settings.rule)])
        if touched and settings.on_touched == "refuse":
            report.positions += 1
            self.finish = "refusal"
            self._trace(drafted, drafted, reading, touched=True, exact=True)
            return None, False
        chosen, exact, bound = drafted, True, 0.0
        if not stands_unseen(reading, settings.rule, settings.mode):
            chosen, exact, bound = await self._judged(drafted, top, reading)
        if reading is not None and reading.beyond is not None and top.tail_mass:  # nothing reported is moved; the rest may be
            exact, bound = False, min(1.0, bound + tail_share(top.tail_mass, reading.beyond))
            report.untouched_but_for = max(report.untouched_but_for, top.tail_mass)
        report.neutral += len(top.neutral)
        report.positions += 1
        report.untouched += not touched
        report.exact += exact
        report.largest_bound = max(report.largest_bound, bound)
        changed = touched and chosen != drafted
        report.changed += changed
        self._trace(chosen, drafted, reading, touched=touched, exact=exact)
        stands = chosen == drafted
        self._rewritten |= not stands
        report.accepted += stands
        return self._emit(chosen, stands=stands), stands

    def _trace(self, chosen: int, drafted: int, reading: Any, *, touched: bool, exact: bool) -> None:
        if self.settings.trace:
            self.steps.append(Step.at(self.backend.tokenizer, chosen, drafted, reading, touched=touched, exact=exact))

    async def _inform(self, reading: Any, top: TopLogprobs) -> None:
        """A small model of another vocabulary may have to look at the reported tokens before it can tell what it moves."""
        if self.reader is not None:
            await self.reader.informed(reading, len(self.written), top, also=() if top.ids.size else sorted(self.end_ids))

    async def _judged(self, drafted: int, top: TopLogprobs, reading: Any) -> tuple[int, bool, float]:
        """The token that is to stand, whether it is exact, and the bound where it is not."""
        rule, sampling, mode = self.settings.rule, self.settings.sampling, self.settings.mode
        if not top.ids.size:  # the server ended the answer without a report; nothing leaves the client by that
            exact = end_stands(reading, rule, sampling, self.end_ids)
            return drafted, exact, 0.0 if exact else 1.0
        whole, processed = True, None
        if mode is Mode.PASS_THROUGH and self.capabilities.processed:
            processed = top
            start = time.perf_counter()
            top, whole = await raw_report(self.backend, self.written.prefix, top, sampling, self._counting)
            self.report.seconds_server += time.perf_counter() - start
            await self._inform(reading, top)
        verdict = judge(top, reading, rule, sampling, mode, self.report.positions, drafted=drafted, processed=processed)
        if verdict.touched and (bounds := rule.bounds(reading)) is not None:
            verdict = widened(verdict, top, bounds, rule.shift(reading), rule.ratio(reading), sampling)
        chosen = self._choose(verdict, drafted)
        self.report.completed += verdict.completed
        # A better token may be one that cannot be sent back as text, that nobody can tell, or that the server's own cuts left out.
        known = whole and chosen == verdict.token and not top.overshadowed
        return chosen, *((verdict.exact, verdict.bound) if known else (False, 1.0))

    def _choose(self, verdict: Verdict, drafted: int) -> int:
        """The best token after which the server can go on; at a touched position never a draft that is not the best of all."""
        for token in verdict.ranking:
            own = token == verdict.token or not verdict.touched
            if own if token == drafted else self._sendable(token):
                return token
        raise RequestRejected(
            "no token that may stand here can be sent back to this server as text",
            hint="use a server that takes token ids, or a larger top_logprobs",
        )

    def _sendable(self, token: int) -> bool:
        """Whether an answer may go on after this token; where none can go on at all, the next request says so."""
        alone = token in self.end_ids or not self.capabilities.continues
        return alone or self.backend.resume([*self.written.prefix, token]) is not None

    def _emit(self, token: int, *, stands: bool) -> Piece:
        if self.report.seconds_first_token is None:
            self.report.seconds_first_token = time.perf_counter() - self.start
        text = self.written.push(token)
        if not stands:
            if self.reader is not None:
                self.reader.rollback(len(self.written) - 1)
            if token not in self.end_ids:
                self._resume()
        if token in self.end_ids or self.written.text.stopped is not None:
            self.finish = "stop"
        elif self.report.positions >= self.settings.max_new_tokens:
            self.finish = "length"
        return Piece(text, (token,))

    def _resume(self) -> None:
        """Go on as the server will split the text; caches go back to the last id that both have."""
        kept = self.written.adopt(self.backend.resume(self.written.prefix))
        if kept is None:
            return
        self.report.retokenised += 1
        if self.reader is not None and kept < len(self.written):
            self.reader.rollback(kept)

    def _last(self) -> Piece:
        self.report.requests = self._tally.requests
        self.report.seconds_total = time.perf_counter() - self.start
        if self.reader is not None:
            self.report.seconds_small = self.reader.seconds
        self.report.trace = tuple(self.steps)
        refused = self.finish == "refusal"
        rest = self.settings.refusal if refused else self.written.text.finish()
        result = Result(
            text=self.settings.refusal if refused else self.written.text.released,
            token_ids=() if refused else tuple(self.written.tokens),
            finish_reason=str(self.finish),
            usage=Usage(self._prompt_tokens, len(self.written)),
            report=self.report,
            stop_sequence=self.written.text.stopped,
        )
        return Piece(rest, (), result.finish_reason, result, replaces=refused)
