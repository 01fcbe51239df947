"""What the dialects share: limits and counters, token deadlines, refusals, and an answer that stops when the client is gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from uld_adapters.emulator.engine import Engine, Row, Session
from uld_adapters.emulator.sampling import Sampler, Warp

START = "emulator.start"


@dataclass(frozen=True)
class Limits:
    """What the server grants; `max_top` is the largest k (-1: the vocabulary), `max_total_tokens` counts prompt and answer.

    `seed` is for sampling requests that name none; None draws one for each. The last three are the OpenAI dialect's, see `build_app`.
    """

    model_id: str
    max_top: int
    max_total_tokens: int
    seconds_per_token: float = 0.0
    logprobs: bool = True
    seed: int | None = None
    prefill: str = "none"
    token_bytes: bool = True
    token_prompts: bool = True


@dataclass
class Stats:
    """Counters over the life of a server: generation requests, tokens written, requests whose client went away."""

    requests: int = 0
    tokens: int = 0
    cancelled: int = 0


@dataclass(frozen=True)
class Step:
    """One written token with log p before and log q after the sampling options, in nats."""

    token: int
    raw: Row
    processed: Row


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(str(body))
        self.status = status
        self.body = body

    def response(self) -> Response:
        """JSON, or plain text where the real server answers in plain text."""
        if isinstance(self.body, str):
            return Response(self.body, self.status, media_type="text/plain")
        return JSONResponse(self.body, self.status)


@dataclass(frozen=True)
class Desk:
    """Everything a dialect works with."""

    engine: Engine
    limits: Limits
    stats: Stats

    async def write(self, request: Request, prompt: list[int], n: int, warp: Warp, sampler: Sampler) -> AsyncIterator[Step]:
        """Up to n tokens, token i not before start + round trip + (i + 1) * seconds_per_token; the caller stops at an end."""
        loop = asyncio.get_running_loop()
        session = Session(prompt)
        start: float = request.scope[START]
        for i in range(n):
            raw = await self.engine.next(session)
            processed = warp(raw)
            token = sampler(processed)
            due = start + (i + 1) * self.limits.seconds_per_token - loop.time()
            if due > 0:
                await asyncio.sleep(due)
            self.stats.tokens += 1
            yield Step(token, raw, processed)
            session.append(token)


class Answer(Response):
    """A response that is worked out while it is sent, and given up as soon as the client is gone."""

    def __init__(self, work: Callable[[], Awaitable[Response] | AsyncIterator[bytes]], stats: Stats) -> None:
        super().__init__(media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        del self.headers["content-length"]
        self._work = work
        self._stats = stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; count the request, and whether it was given up."""
        complete = False

        async def forward(message: Message) -> None:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        self._stats.requests += 1
        work = asyncio.ensure_future(self._run(scope, receive, forward))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if complete:
                await asyncio.wait({work})
            elif not work.done():
                self._stats.cancelled += 1
        finally:
            work.cancel()
            gone.cancel()
            outcome, _ = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work()
        if isinstance(work, Awaitable):
            try:
                response = await work
            except Refusal as refusal:
                response = refusal.response()
            await response(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(work) as events:  # type: ignore[type-var]
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any, *, space: bool = False) -> bytes:
    """One server-sent event; TGI writes no space after the colon, the others do."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data:{' ' if space else ''}{text}\n\n".encode()
