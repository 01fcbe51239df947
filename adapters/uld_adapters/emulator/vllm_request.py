"""Requests of the vLLM dialect: read, and refused in the shape and with the words of the real server (0.32)."""

import json
import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from uld_adapters.emulator.desk import Limits, Refusal
from uld_adapters.emulator.engine import Engine
from uld_adapters.emulator.sampling import Warp

Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(frozen=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """A body of `/v1/completions`; fields that are not emulated are passed over."""

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    prompt: str | list[int] | None = None
    max_tokens: int | None = 16
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class TokenizeRequest(BaseModel):
    """A body of `/tokenize`: a prompt, or messages for the chat template."""

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """A body of `/detokenize`."""

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    tokens: list[int]


@dataclass(frozen=True)
class Plan:
    """A validated request; `top` is k at written positions, `prompt_top` at the prompt's (None: not asked for)."""

    ids: list[int]
    max_tokens: int
    warp: Warp
    seed: int | None
    top: int | None
    prompt_top: int | None
    stop: tuple[str, ...]


def bad_request(message: str, *, param: str | None = None, status: int = 400, kind: str = "BadRequestError") -> Refusal:
    """An error in the real server's shape."""
    return Refusal(status, {"error": {"message": message, "type": kind, "param": param, "code": status}})


async def body_of(request: Request, kind: type[Body]) -> Body:
    """Read a body, or refuse it."""
    try:
        return kind.model_validate(json.loads(await request.body()))
    except ValidationError as error:
        raise bad_request(str(error.errors(include_url=False)), kind="Bad Request") from error
    except ValueError as error:
        raise bad_request(f"[{{'type': 'json_invalid', 'msg': 'JSON decode error', 'ctx': {{'error': {str(error)!r}}}}}]") from error


def check_model(name: str | None, limits: Limits) -> None:
    """Refuse a model that is not served."""
    if name is not None and name != limits.model_id:
        raise bad_request(f"The model `{name}` does not exist.", param="model", status=404, kind="NotFoundError")


def check_ids(ids: list[int], engine: Engine) -> None:
    """Refuse ids outside the vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < engine.rows:
        wrong = next(i for i in ids if not 0 <= i < engine.rows)
        raise bad_request(f"Token id {wrong} is out of vocabulary")


def _top(asked: int | None, what: str, engine: Engine, limits: Limits) -> int | None:
    if not asked:
        return asked
    if asked < -1:
        raise bad_request(f"`{what}` must be a positive value or -1.", param=what)
    wanted = engine.rows if asked == -1 else asked
    cap = engine.rows if limits.max_top == -1 else limits.max_top
    if wanted > cap:
        kind = "prompt" if what == "prompt_logprobs" else "sample"
        raise bad_request(f"Requested {kind} logprobs of {wanted}, which is greater than max allowed: {cap}", param=what)
    return min(wanted, engine.rows)


def _warp(body: CompletionRequest, engine: Engine) -> Warp:
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature < 0:
        raise bad_request(f"temperature must be non-negative, got {temperature}.", param="temperature")
    if body.top_p is not None and not 0.0 < body.top_p <= 1.0:
        raise bad_request(f"top_p must be in (0, 1], got {body.top_p}.", param="top_p")
    if body.min_p is not None and not 0.0 <= body.min_p <= 1.0:
        raise bad_request("min_p must be in [0, 1].", param="min_p")
    if body.top_k is not None and body.top_k < -1:
        raise bad_request(f"top_k must be 0 (disable), or at least 1, got {body.top_k}.", param="top_k")
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal():
            raise bad_request(f"Found invalid token_id '{key}' in logit_bias: token_id must be an integer.", param="logit_bias")
        bias[int(key)] = min(100.0, max(-100.0, value))
    beyond = [token for token in bias if token >= engine.rows]
    if beyond:
        text = f"token_id(s) {beyond} in logit_bias contain out-of-vocab token ids. Vocabulary size: {engine.rows}"
        raise bad_request(text, param="logit_bias")
    if temperature == 0.0:
        return Warp(bias=bias)
    top_k = body.top_k if body.top_k and body.top_k > 0 else None
    return Warp(temperature, top_k, body.top_p, body.min_p, bias)


def check(body: CompletionRequest, engine: Engine, limits: Limits) -> Plan:
    """Validate a request and tokenise its prompt."""
    check_model(body.model, limits)
    if body.prompt is None or body.prompt in ("", []):
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if body.n != 1:
        raise bad_request(f"n is {body.n}; one answer a request is emulated", param="n")
    if isinstance(body.prompt, str):
        ids = engine.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        ids = list(body.prompt)
    check_ids(ids, engine)
    top = _top(body.logprobs, "logprobs", engine, limits)
    asked = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    prompt_top = _top(asked, "prompt_logprobs", engine, limits)
    if body.stream and body.prompt_logprobs is not None:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", param="stream_options")
    longest = limits.max_total_tokens
    wanted = max(0, longest - len(ids)) if body.max_tokens is None else body.max_tokens
    if wanted < 1 and not (body.echo and body.max_tokens == 0):
        raise bad_request(f"max_tokens must be at least 1, got {wanted}.", param="max_tokens")
    if len(ids) + max(wanted, 1) > longest:
        raise bad_request(
            f"This model's maximum context length is {longest} tokens. However, you requested {wanted} output tokens and your prompt"
            f" contains at least {len(ids)} input tokens, for a total of at least {len(ids) + wanted} tokens."
            " Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )
    named = limits.seed if body.seed is None else body.seed
    seed = None if body.temperature == 0 else secrets.randbits(63) if named is None else named
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Plan(ids, wanted, _warp(body, engine), seed, top, prompt_top, stop)
