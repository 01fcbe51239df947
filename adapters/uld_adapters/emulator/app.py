"""One dialect as an ASGI application: its routes behind a key and a round trip."""

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uld_adapters.emulator import openai, tgi, vllm
from uld_adapters.emulator.desk import START, Desk, Limits, Refusal, Stats
from uld_adapters.emulator.engine import Engine
from uld_adapters.emulator.openai_bodies import DENIED


class Front:
    """The door: checks the key, and lets no byte out before the round trip is over."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, guarded: Callable[[Scope], bool], denied: Any, round_trip: float) -> None:
        self._app = app
        self._denied = denied
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._guarded = guarded
        self._round_trip = round_trip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        scope[START] = start = loop.time() + self._round_trip

        async def delayed(message: Message) -> None:
            if message["type"] == "http.response.start" and (due := start - loop.time()) > 0:
                await asyncio.sleep(due)
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._key is not None and self._guarded(scope) and not hmac.compare_digest(given, self._key):
            await JSONResponse(self._denied, 401)(scope, receive, delayed)
            return
        await self._app(scope, receive, delayed)


async def _refused(_: Request, refusal: Exception) -> Response:
    if not isinstance(refusal, Refusal):
        raise refusal
    return refusal.response()


def assemble(engine: Engine, limits: Limits, *, dialect: str, round_trip: float, api_key: str | None) -> Starlette:
    """The application of one dialect; `app.state` holds `stats` and `engine`."""
    module = {"tgi": tgi, "vllm": vllm, "openai": openai}[dialect]
    denied = DENIED if dialect == "openai" else {"error": "Unauthorized"}
    desk = Desk(engine, limits, Stats())
    app = Starlette(
        routes=module.routes(desk),
        middleware=[Middleware(Front, api_key=api_key, guarded=module.guarded, denied=denied, round_trip=round_trip)],
        exception_handlers={Refusal: _refused},
    )
    app.state.stats = desk.stats
    app.state.engine = engine
    return app
