"""The dialect of the OpenAI API: strings and bytes instead of ids, k of at most 20 (chat) and 5 (completions)."""

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from uld_adapters.emulator.desk import Answer, Desk, Refusal, event
from uld_adapters.emulator.openai_bodies import ChatRequest, Common, CompletionRequest, body_of, no_model, refusal
from uld_adapters.emulator.openai_forms import Chat, Completions, Form, Piece
from uld_adapters.emulator.openai_request import Plan, check_chat, check_completion
from uld_adapters.emulator.openai_text import Names, Telling
from uld_adapters.emulator.sampling import Sampler

FINGERPRINT = "fp_emulated"


def guarded(scope: Scope) -> bool:
    """Every route needs the key."""
    return True


def routes(desk: Desk) -> list[BaseRoute]:
    """Everything this dialect answers."""
    dialect = OpenAI(desk)
    return [
        Route("/v1/chat/completions", dialect.chat, methods=["POST"]),
        Route("/v1/completions", dialect.completions, methods=["POST"]),
        Route("/v1/models", dialect.models, methods=["GET"]),
        Route("/v1/models/{name:path}", dialect.model, methods=["GET"]),
        Route("/{path:path}", dialect.nothing, methods=["GET", "POST"]),
    ]


class OpenAI:
    """The routes of one served model."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._engine = desk.engine
        self._limits = desk.limits
        self._names = Names(desk.engine, token_bytes=desk.limits.token_bytes)

    async def _pieces(self, request: Request, plan: Plan, form: Form) -> AsyncIterator[Piece]:
        """The answer in whole characters; the last piece says how it ended."""
        telling = Telling(plan.stop)
        steps = self._desk.write(request, plan.ids, plan.max_tokens, plan.warp, Sampler(plan.seed))
        count = 0
        async with aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                count += 1
                ended = step.token in self._engine.end_ids
                if not ended or form.tells_end:
                    telling.push(step, b"" if ended else self._names.spelling(step.token))
                finish = "stop" if ended or telling.stopped else "length" if count == plan.max_tokens else None
                text, ready = telling.take(last=finish is not None)
                if text or ready or finish:
                    yield Piece(text, ready, finish, count)
                if finish:
                    return

    def _head(self, form: Form, kind: str) -> dict[str, Any]:
        about = {"model": self._limits.model_id, "service_tier": "default", "system_fingerprint": FINGERPRINT}
        return {"id": f"{form.prefix}-{secrets.token_hex(14)}", "object": kind, "created": int(time.time())} | about

    def _usage(self, plan: Plan, written: int) -> dict[str, Any]:
        counts = {"prompt_tokens": len(plan.ids), "completion_tokens": written, "total_tokens": len(plan.ids) + written}
        details = {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        return counts | {"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "completion_tokens_details": details}

    async def _whole(self, request: Request, plan: Plan, form: Form) -> Response:
        pieces = self._pieces(request, plan, form)
        try:
            async with aclosing(pieces):  # type: ignore[type-var]
                told = [piece async for piece in pieces]
        except RuntimeError as error:
            raise failure(error) from error
        last = told[-1]
        whole = Piece("".join(piece.text for piece in told), [s for piece in told for s in piece.steps], last.finish, last.written)
        choice, usage = form.whole(plan, whole), self._usage(plan, whole.written)
        return JSONResponse(self._head(form, form.whole_kind) | {"choices": [choice], "usage": usage}, headers=_tag())

    async def _events(self, request: Request, plan: Plan, form: Form, *, usage: bool) -> AsyncIterator[bytes]:
        """The opening, the pieces, the usage where it was asked for, [DONE]."""
        head, written, first = self._head(form, form.chunk_kind), 0, True

        def chunk(choice: dict[str, Any]) -> bytes:
            return event(head | {"choices": [choice]} | ({"usage": None} if usage else {}), space=True)

        for choice in form.opening():
            yield chunk(choice)
        try:
            pieces = self._pieces(request, plan, form)
            async with aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    written = piece.written
                    for choice in form.chunks(plan, piece, first=first):
                        yield chunk(choice)
                    first = False
            if usage:
                yield event(head | {"choices": [], "usage": self._usage(plan, written)}, space=True)
        except RuntimeError as error:
            yield event(failure(error).body, space=True)
        yield event("[DONE]", space=True)

    def _answer(self, request: Request, body: Common, plan: Callable[[], Plan], form: Form) -> Response:
        if not body.stream:
            return Answer(lambda: self._whole(request, plan(), form), self._desk.stats)
        usage = body.stream_options is not None and body.stream_options.include_usage
        checked = plan()  # refused before the stream begins
        answer = Answer(lambda: self._events(request, checked, form, usage=usage), self._desk.stats)
        answer.headers.update(_tag())
        return answer

    async def chat(self, request: Request) -> Response:
        """The answer to a conversation, whole or as a stream."""
        body = await body_of(request, ChatRequest)
        return self._answer(request, body, lambda: check_chat(body, self._engine, self._limits), Chat(self._names))

    async def completions(self, request: Request) -> Response:
        """Text after a prompt, whole or as a stream."""
        body = await body_of(request, CompletionRequest)
        return self._answer(request, body, lambda: check_completion(body, self._engine, self._limits), Completions(self._names))

    def _entry(self) -> dict[str, Any]:
        return {"id": self._limits.model_id, "object": "model", "created": 1700000000, "owned_by": "system"}

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._entry()]}, headers=_tag())

    async def model(self, request: Request) -> Response:
        """One model by name."""
        if (name := request.path_params["name"]) != self._limits.model_id:
            raise no_model(name)
        return JSONResponse(self._entry(), headers=_tag())

    async def nothing(self, request: Request) -> Response:
        """What the real API says of an address that it does not have."""
        raise refusal(f"Invalid URL ({request.method} {request.url.path})", status=404)


def _tag() -> dict[str, str]:
    return {"x-request-id": f"req_{secrets.token_hex(16)}"}


def failure(error: RuntimeError) -> Refusal:
    """A model that fails, in the real API's words."""
    text = f"The server had an error while processing your request. ({error})"
    return refusal(text, status=500, kind="server_error")
