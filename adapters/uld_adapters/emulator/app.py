"""What both dialects share: routes behind a key and a round trip, token deadlines, and a stop when the client is gone."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uld_adapters.emulator.engine import Engine, Row, Session
from uld_adapters.emulator.sampling import Sampler, Warp

_START = "emulator.start"


@dataclass(frozen=True)
class Limits:
    """What the server grants; `max_top` is the largest k (-1: the vocabulary), `max_total_tokens` counts prompt and answer.

    `seed` is for sampling requests that name none; None draws one for each.
    """

    model_id: str
    max_top: int
    max_total_tokens: int
    seconds_per_token: float = 0.0
    logprobs: bool = True
    seed: int | None = None


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
        start: float = request.scope[_START]
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


class Front:
    """The door: checks the key, and lets no byte out before the round trip is over."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, guarded: Callable[[Scope], bool], round_trip: float) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._guarded = guarded
        self._round_trip = round_trip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        scope[_START] = start = loop.time() + self._round_trip

        async def delayed(message: Message) -> None:
            if message["type"] == "http.response.start" and (due := start - loop.time()) > 0:
                await asyncio.sleep(due)
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._key is not None and self._guarded(scope) and not hmac.compare_digest(given, self._key):
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, delayed)
            return
        await self._app(scope, receive, delayed)


def event(data: Any, *, space: bool = False) -> bytes:
    """One server-sent event; TGI writes no space after the colon, vLLM does."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data:{' ' if space else ''}{text}\n\n".encode()


async def _refused(_: Request, refusal: Exception) -> Response:
    if not isinstance(refusal, Refusal):
        raise refusal
    return refusal.response()


def assemble(engine: Engine, limits: Limits, *, dialect: str, round_trip: float, api_key: str | None) -> Starlette:
    """The application of one dialect; `app.state` holds `stats` and `engine`."""
    from uld_adapters.emulator import tgi, vllm

    module = {"tgi": tgi, "vllm": vllm}[dialect]
    desk = Desk(engine, limits, Stats())
    app = Starlette(
        routes=module.routes(desk),
        middleware=[Middleware(Front, api_key=api_key, guarded=module.guarded, round_trip=round_trip)],
        exception_handlers={Refusal: _refused},
    )
    app.state.stats = desk.stats
    app.state.engine = engine
    return app
