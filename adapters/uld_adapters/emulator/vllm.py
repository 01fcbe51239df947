"""The dialect of vLLM 0.32: ids in and out, raw log-probabilities, the written token always among the reported ones."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from uld_adapters.emulator.desk import Answer, Desk, event
from uld_adapters.emulator.sampling import Row, Sampler, top
from uld_adapters.emulator.vllm_request import (
    CompletionRequest,
    DetokenizeRequest,
    Plan,
    TokenizeRequest,
    bad_request,
    body_of,
    check,
    check_ids,
    check_model,
)
from uld_adapters.emulator.vllm_text import Report, Text

FINGERPRINT = "vllm-0.32.0-emulated"
LOWEST = -9999.0  # what the real server writes for minus infinity


def guarded(scope: Scope) -> bool:
    """Only the OpenAI routes need the key."""
    return str(scope["path"]).startswith("/v1")


def routes(desk: Desk) -> list[BaseRoute]:
    """Everything this dialect answers."""
    dialect = VLLM(desk)
    return [
        Route("/v1/completions", dialect.completions, methods=["POST"]),
        Route("/v1/models", dialect.models, methods=["GET"]),
        Route("/tokenize", dialect.tokenize, methods=["POST"]),
        Route("/detokenize", dialect.detokenize, methods=["POST"]),
        Route("/version", dialect.version, methods=["GET"]),
        Route("/health", dialect.health, methods=["GET"]),
    ]


@dataclass(frozen=True)
class _Piece:
    """One token of an answer, as it is sent."""

    token: int
    text: str
    finish: str | None
    stop_reason: str | None


class VLLM:
    """The routes of one served model."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._engine = desk.engine
        self._limits = desk.limits

    def _name(self, token: int, body: CompletionRequest) -> str:
        if body.return_tokens_as_token_ids:
            return f"token_id:{token}"
        text: str = self._engine.tokenizer.decode([token])
        return "" if text.endswith("\ufffd") else text

    def _entries(self, row: Row, token: int, k: int) -> Iterator[int]:
        """The written token first, then the k most probable ones: k or k + 1 entries."""
        yield token
        yield from (int(i) for i in top(row, k) if i != token)

    def _report(self, report: Report, row: Row | None, token: int, k: int, body: CompletionRequest) -> None:
        if row is None:
            report.add(self._name(token, body), None, None)
            return
        entries = {self._name(i, body): max(float(row[i]), LOWEST) for i in self._entries(row, token, k)}
        report.add(self._name(token, body), max(float(row[token]), LOWEST), entries)

    def _prompt_entry(self, row: Row, token: int, k: int) -> dict[str, Any]:
        ids = list(self._entries(row, token, k))
        return {
            str(i): {
                "logprob": max(float(row[i]), LOWEST),
                "rank": int(np.count_nonzero(row > row[i])) + 1,
                "decoded_token": self._engine.tokenizer.decode([i]),
            }
            for i in ids
        }

    async def _pieces(self, request: Request, body: CompletionRequest, plan: Plan, report: Report) -> AsyncIterator[_Piece]:
        """Write the answer token by token; the report grows with it."""
        text = Text(self._engine.tokenizer, plan.ids, plan.stop)
        count = 0
        steps = self._desk.write(request, plan.ids, plan.max_tokens, plan.warp, Sampler(plan.seed))
        async with aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                count += 1
                if plan.top is not None:
                    self._report(report, step.raw, step.token, plan.top, body)
                ended = step.token in self._engine.end_ids and not body.ignore_eos
                if not ended:
                    text.push(step.token)
                stopped = ended or text.stopped_by is not None
                finish = "stop" if stopped else "length" if count == plan.max_tokens else None
                yield _Piece(step.token, text.delta(last=finish is not None), finish, text.stopped_by)
                if finish:
                    return

    async def _echo(self, body: CompletionRequest, plan: Plan, report: Report) -> list[dict[str, Any] | None] | None:
        """The prompt's own log-probabilities; an echo puts them before the answer's."""
        if plan.prompt_top is None or not self._limits.logprobs:
            return None
        rows = await self._engine.prompt(plan.ids)  # (tokens, vocab)
        if body.echo and plan.top is not None:
            for i, token in enumerate(plan.ids):
                self._report(report, rows[i - 1] if i else None, token, plan.top, body)
        return [None, *(self._prompt_entry(rows[i - 1], t, plan.prompt_top) for i, t in enumerate(plan.ids) if i)]

    def _usage(self, plan: Plan, written: int) -> dict[str, int]:
        # An echo without an answer still costs the real server one token.
        done = max(written, 1)
        return {"prompt_tokens": len(plan.ids), "total_tokens": len(plan.ids) + done, "completion_tokens": done}

    def _head(self) -> dict[str, Any]:
        created = int(time.time())
        return {"id": f"cmpl-{secrets.token_hex(8)}", "object": "text_completion", "created": created, "model": self._limits.model_id}

    async def _whole(self, request: Request, body: CompletionRequest) -> Response:
        plan, report = self._plan(body)
        prompt_logprobs = await self._echo(body, plan, report)
        pieces = self._pieces(request, body, plan, report)
        async with aclosing(pieces):  # type: ignore[type-var]
            written = [piece async for piece in pieces]
        text = "".join(piece.text for piece in written)
        ids = [piece.token for piece in written]
        choice = {
            "index": 0,
            "text": self._engine.tokenizer.decode(plan.ids) + text if body.echo else text,
            "logprobs": None if plan.top is None else report.since(0),
            "finish_reason": written[-1].finish if written else "length",
            "stop_reason": written[-1].stop_reason if written else None,
            "token_ids": ids if body.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs,
            "prompt_token_ids": plan.ids if body.return_token_ids else None,
            "routed_experts": None,
        }
        usage = self._usage(plan, len(ids)) | {"prompt_tokens_details": None, "completion_tokens_details": None}
        tail = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
        about = {"choices": [choice], "service_tier": None, "system_fingerprint": FINGERPRINT, "usage": usage}
        return JSONResponse(self._head() | about | tail)

    def _plan(self, body: CompletionRequest) -> tuple[Plan, Report]:
        if not self._limits.logprobs:
            body = body.model_copy(update={"logprobs": None, "prompt_logprobs": None})
        return check(body, self._engine, self._limits), Report()

    async def _events(self, request: Request, body: CompletionRequest, plan: Plan, report: Report) -> AsyncIterator[bytes]:
        """One chunk a token, then the usage where it was asked for, then [DONE]."""
        head = self._head()
        count = 0
        try:
            await self._echo(body, plan, report)
            pieces = self._pieces(request, body, plan, report)
            async with aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    first, since = count == 0, len(report.tokens) - 1
                    count += 1
                    choice = {
                        "index": 0,
                        "text": self._engine.tokenizer.decode(plan.ids) + piece.text if body.echo and first else piece.text,
                        "logprobs": None if plan.top is None else report.since(0 if first else since),
                        "finish_reason": piece.finish,
                        "stop_reason": piece.stop_reason,
                        "prompt_token_ids": plan.ids if first and body.return_token_ids else None,
                        "token_ids": [piece.token] if body.return_token_ids else None,
                    }
                    yield event(head | {"choices": [choice]}, space=True)
            if body.stream_options and body.stream_options.include_usage:
                usage = {"choices": [], "usage": self._usage(plan, count), "system_fingerprint": FINGERPRINT}
                yield event(head | usage, space=True)
        except RuntimeError as error:
            yield event(bad_request(str(error), status=500, kind="InternalServerError").body, space=True)
        yield event("[DONE]", space=True)

    async def completions(self, request: Request) -> Response:
        """Text after a prompt, whole or as a stream."""
        body = await body_of(request, CompletionRequest)
        if not body.stream:
            return Answer(lambda: self._whole(request, body), self._desk.stats)
        plan, report = self._plan(body)  # refused before the stream begins
        return Answer(lambda: self._events(request, body, plan, report), self._desk.stats)

    async def tokenize(self, request: Request) -> Response:
        """A text or a conversation as ids."""
        body = await body_of(request, TokenizeRequest)
        check_model(body.model, self._limits)
        tokenizer = self._engine.tokenizer
        text, special = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            options = {"add_generation_prompt": body.add_generation_prompt, "continue_final_message": body.continue_final_message}
            text, special = tokenizer.apply_chat_template(body.messages, tokenize=False, **options), bool(body.add_special_tokens)
        if text is None:
            raise bad_request("prompt or messages must be given")
        ids = tokenizer.encode(text, add_special_tokens=special)
        names = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return JSONResponse({"count": len(ids), "max_model_len": self._limits.max_total_tokens, "tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        """Ids as text, control tokens and all."""
        body = await body_of(request, DetokenizeRequest)
        check_model(body.model, self._limits)
        check_ids(body.tokens, self._engine)
        return JSONResponse({"prompt": self._engine.tokenizer.decode(body.tokens)})

    async def models(self, request: Request) -> Response:
        """The one model."""
        model = self._limits.model_id
        entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "vllm", "root": model, "parent": None}
        return JSONResponse({"object": "list", "data": [entry | {"max_model_len": self._limits.max_total_tokens, "permission": []}]})

    async def version(self, request: Request) -> Response:
        """The version that is imitated."""
        return JSONResponse({"version": "0.32.0"})

    async def health(self, request: Request) -> Response:
        """Always well."""
        return Response()
