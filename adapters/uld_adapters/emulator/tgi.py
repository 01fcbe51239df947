"""The dialect of text-generation-inference 3.3: text in, log-probabilities after the sampling options, a small cap on k."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from uld_adapters.emulator.desk import Answer, Desk, Refusal, Step, event
from uld_adapters.emulator.sampling import Row, Sampler, top
from uld_adapters.emulator.tgi_request import MAX_STOP, GenerateRequest, Plan, check, parse


def guarded(scope: Scope) -> bool:
    """Only requests that use the model need the key."""
    return scope["method"] == "POST"


def routes(desk: Desk) -> list[BaseRoute]:
    """Everything this dialect answers."""
    dialect = TGI(desk)
    return [
        Route("/", dialect.compat, methods=["POST"]),
        Route("/", dialect.health, methods=["GET"]),
        Route("/generate", dialect.generate, methods=["POST"]),
        Route("/generate_stream", dialect.generate_stream, methods=["POST"]),
        Route("/tokenize", dialect.tokenize, methods=["POST"]),
        Route("/info", dialect.info, methods=["GET"]),
        Route("/health", dialect.health, methods=["GET"]),
        Route("/v1/models", dialect.models, methods=["GET"]),
    ]


class _Text:
    """Token texts as the real server streams them: nothing until a character is complete."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self.ids = list(prompt)
        self._prefix, self._read = max(0, len(prompt) - 5), len(prompt)

    def push(self, token: int) -> str:
        """Take one token, and return the text that it completes."""
        self.ids.append(token)
        text, self._prefix, self._read = self._since(self._prefix, self._read, skip=False)
        return text

    def generated(self, count: int) -> str:
        """The last `count` tokens as text; empty when they end inside a character, as in the real server."""
        return self._since(max(0, len(self.ids) - count - 1), len(self.ids) - count, skip=True)[0]

    def _since(self, prefix: int, read: int, *, skip: bool) -> tuple[str, int, int]:
        before = self._tokenizer.decode(self.ids[prefix:read], skip_special_tokens=skip)
        whole = self._tokenizer.decode(self.ids[prefix:], skip_special_tokens=skip)
        if len(whole) > len(before) and not whole.endswith("\ufffd"):
            return whole[len(before) :], read, len(self.ids)
        return "", prefix, read


class TGI:
    """The routes of one served model."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._engine = desk.engine
        self._limits = desk.limits

    def _token(self, token: int, value: Any, text: str) -> dict[str, Any]:
        known = self._limits.logprobs and np.isfinite(value)
        logprob = float(str(np.float32(value))) if known else None  # the shortest decimal of a float32, as Rust writes it
        return {"id": token, "text": text, "logprob": logprob, "special": token in self._engine.special_ids}

    def _top(self, row: Row, n: int) -> list[dict[str, Any]]:
        if not self._limits.logprobs:
            return []
        return [self._token(int(i), row[i], self._engine.tokenizer.decode([int(i)])) for i in top(row, n, ties=True)]

    async def _stream(self, request: Request, plan: Plan) -> AsyncIterator[dict[str, Any]]:
        """One StreamResponse a token; the last one carries the text and the details."""
        text = _Text(self._engine.tokenizer, plan.ids)
        written = ""
        steps = self._desk.write(request, plan.ids, plan.max_new_tokens, plan.warp, Sampler(plan.seed))
        index = 0
        async with aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                index += 1
                piece = text.push(step.token)
                written += piece
                answer = self._event(index, step, piece, plan.top_n)
                reason = self._finish(index, step.token, written, plan)
                if reason:
                    generated = text.generated(index)
                    answer["generated_text"] = plan.text + generated if plan.full_text else generated
                    answer["details"] = {
                        "finish_reason": reason, "generated_tokens": index, "seed": plan.seed, "input_length": len(plan.ids),
                    }  # fmt: skip
                yield answer
                if reason:
                    return

    def _event(self, index: int, step: Step, piece: str, top_n: int) -> dict[str, Any]:
        answer: dict[str, Any] = {"index": index, "token": self._token(step.token, step.processed[step.token], piece)}
        entries = self._top(step.processed, top_n)
        if entries:
            answer["top_tokens"] = entries
        return answer | {"generated_text": None, "details": None}

    def _finish(self, count: int, token: int, written: str, plan: Plan) -> str | None:
        if count >= plan.max_new_tokens:
            return "length"  # the real server looks at the length first, even when the last token is the end token
        if token in self._engine.end_ids:
            return "eos_token"
        return "stop_sequence" if plan.stop and written.endswith(plan.stop) else None

    async def _events(self, request: Request, body: GenerateRequest, full_text: bool) -> AsyncIterator[bytes]:
        """The event stream; here the real server reports invalid requests as an event, with status 200."""
        try:
            plan = check(body, self._engine, self._limits, stream=True, full_text=full_text)
            answers = self._stream(request, plan)
            async with aclosing(answers):  # type: ignore[type-var]
                async for answer in answers:
                    yield event(answer if plan.details else answer | {"details": None})
        except Refusal as refusal:
            yield event(refusal.body)
        except RuntimeError as error:
            yield event({"error": f"Request failed during generation: {error}", "error_type": "generation"})

    async def _whole(self, request: Request, body: GenerateRequest, *, compat: bool) -> Response:
        plan = check(body, self._engine, self._limits, stream=False, full_text=compat)
        answers = self._stream(request, plan)
        try:
            async with aclosing(answers):  # type: ignore[type-var]
                events = [answer async for answer in answers]
        except RuntimeError as error:
            raise Refusal(424, {"error": f"Request failed during generation: {error}", "error_type": "generation"}) from error
        last = events[-1]
        result: dict[str, Any] = {"generated_text": last["generated_text"]}
        if plan.details:
            details = {key: value for key, value in last["details"].items() if key != "input_length"}
            result["details"] = details | {"prefill": [], "tokens": [answer["token"] for answer in events]}
            if "top_tokens" in last:
                result["details"]["top_tokens"] = [answer["top_tokens"] for answer in events]
        headers = {"x-compute-type": "cpu", "x-prompt-tokens": str(len(plan.ids)), "x-generated-tokens": str(len(events))}
        return JSONResponse([result] if compat else result, headers=headers)

    async def generate(self, request: Request) -> Response:
        """A whole answer."""
        body = await parse(request)
        return Answer(lambda: self._whole(request, body, compat=False), self._desk.stats)

    async def generate_stream(self, request: Request) -> Response:
        """An answer as events."""
        body = await parse(request)
        return Answer(lambda: self._events(request, body, full_text=False), self._desk.stats)

    async def compat(self, request: Request) -> Response:
        """Either of them, as `stream` says; the prompt stands before the text."""
        body = await parse(request)
        if body.stream:
            return Answer(lambda: self._events(request, body, full_text=True), self._desk.stats)
        return Answer(lambda: self._whole(request, body, compat=True), self._desk.stats)

    async def tokenize(self, request: Request) -> Response:
        """A text as ids with their places in it."""
        text = (await parse(request)).inputs
        encoded = self._engine.tokenizer.backend_tokenizer.encode(text, add_special_tokens=True)
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return JSONResponse([{"id": i, "text": text[start:stop], "start": start, "stop": stop} for i, (start, stop) in pairs])

    async def info(self, request: Request) -> Response:
        """The model and the limits; the cap on top_n_tokens is not among them."""
        return JSONResponse(
            {
                "model_id": self._limits.model_id,
                "model_sha": None,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": 128,
                "max_best_of": 1,
                "max_stop_sequences": MAX_STOP,
                "max_input_tokens": self._limits.max_total_tokens - 1,
                "max_total_tokens": self._limits.max_total_tokens,
                "validation_workers": 1,
                "max_client_batch_size": 1,
                "router": "text-generation-router",
                "version": "3.3.6",
                "sha": None,
                "docker_label": None,
            }
        )

    async def models(self, request: Request) -> Response:
        """The one model, in the OpenAI shape."""
        entry = {"id": self._limits.model_id, "object": "model", "created": 0, "owned_by": self._limits.model_id}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, request: Request) -> Response:
        """Always well."""
        return Response()
