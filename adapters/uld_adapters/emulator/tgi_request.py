"""Requests of the TGI dialect: read and refused in the order and with the words of the real router (3.3)."""

import json
import secrets
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from uld_adapters.emulator.desk import Limits, Refusal
from uld_adapters.emulator.engine import Engine
from uld_adapters.emulator.sampling import Warp

MAX_STOP = 4
DEFAULT_NEW_TOKENS = 1024
_RUST = {"string_type": "a string", "list_type": "a sequence", "int_type": "u32", "float_type": "f32", "bool_type": "a boolean"}
_SEEN = {list: "sequence", dict: "map", str: "string", bool: "boolean", int: "integer", float: "floating point", type(None): "null"}


class Parameters(BaseModel):
    """`parameters` of a request; unknown fields are passed over, as the real server does."""

    model_config = ConfigDict(strict=True, frozen=True)

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = Field(default=None, ge=0)
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: int | None = Field(default=None, ge=0)
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = Field(default=None, ge=0)
    top_n_tokens: int | None = Field(default=None, ge=0)


class GenerateRequest(BaseModel):
    """A body; without any `parameters` the real server samples."""

    model_config = ConfigDict(strict=True, frozen=True)

    inputs: str
    parameters: Parameters = Parameters(do_sample=True)
    stream: bool = False


@dataclass(frozen=True)
class Plan:
    """A validated request."""

    text: str
    ids: list[int]
    max_new_tokens: int
    top_n: int
    warp: Warp
    seed: int | None
    details: bool
    full_text: bool
    stop: tuple[str, ...]


async def parse(request: Request) -> GenerateRequest:
    """Read a body, or refuse it in the words of the real server's JSON layer."""
    body = await request.body()
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refusal(415, "Expected request with `Content-Type: application/json`")
    try:
        data = json.loads(body)
    except ValueError as error:
        where = f"line {getattr(error, 'lineno', 1)} column {getattr(error, 'colno', 0)}"
        raise Refusal(400, f"Failed to parse the request body as JSON: {getattr(error, 'msg', error)} at {where}") from error
    try:
        return GenerateRequest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        column = len(body)
        if first["type"] == "missing":
            reason = f"missing field `{path}`"
        else:
            seen = _SEEN.get(type(first["input"]), "value")
            shown = seen if seen in ("sequence", "map", "null") else f"{seen} `{json.dumps(first['input'])}`"
            wanted = _RUST.get(first["type"], "u32")
            reason = f"{path}: invalid {'value' if first['type'] == 'greater_than_equal' else 'type'}: {shown}, expected {wanted}"
            at = body.find(str(first["loc"][-1]).encode())
            column = body.find(b"[", at) if seen == "sequence" and at >= 0 else column
        text = f"Failed to deserialize the JSON body into the target type: {reason} at line 1 column {column}"
        raise Refusal(422, text) from error


def _invalid(text: str) -> Refusal:
    return Refusal(422, {"error": f"Input validation error: {text}", "error_type": "validation"})


def check(body: GenerateRequest, engine: Engine, limits: Limits, *, stream: bool, full_text: bool = False) -> Plan:
    """Check a request in the order and with the texts of the real server."""
    p = body.parameters
    if stream and (p.best_of or 1) != 1:
        raise _invalid("`best_of` != 1 is not supported when streaming tokens")
    if stream and p.decoder_input_details:
        raise _invalid("`decoder_input_details` == true is not supported when streaming tokens")
    if (p.best_of or 1) != 1:
        raise _invalid("`best_of` != 1 is not allowed for this endpoint")
    if p.temperature is not None and p.temperature <= 0:
        raise _invalid("`temperature` must be strictly positive")
    if p.repetition_penalty is not None and p.repetition_penalty <= 0:
        raise _invalid("`repetition_penalty` must be strictly positive")
    if p.frequency_penalty is not None and not -2.0 <= p.frequency_penalty <= 2.0:
        raise _invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
    for name in ("top_p", "typical_p"):
        value = getattr(p, name)
        if value is not None and not 0.0 < value < 1.0:
            raise _invalid(f"`{name}` must be > 0.0 and < 1.0")
    if p.top_k is not None and p.top_k <= 0:
        raise _invalid("`top_k` must be strictly positive")
    if (p.repetition_penalty or 1.0, p.frequency_penalty or 0.0, p.typical_p) != (1.0, 0.0, None):
        raise _invalid("penalties and `typical_p` are not emulated")
    if p.max_new_tokens == 0:
        raise _invalid("`max_new_tokens` must be strictly positive")
    if len(p.stop) > MAX_STOP:
        raise _invalid(f"`stop` supports up to {MAX_STOP} stop sequences. Given: {len(p.stop)}")
    top_n = p.top_n_tokens or 0
    if top_n > limits.max_top >= 0:
        raise _invalid(f"`top_n_tokens` must be >= 0 and <= {limits.max_top}. Given: {top_n}")
    if not body.inputs:
        raise _invalid("`inputs` cannot be empty")
    total, longest = limits.max_total_tokens, limits.max_total_tokens - 1
    if p.truncate is not None and not 0 < p.truncate <= longest:
        raise _invalid(f"`truncate` must be strictly positive and less than {longest}. Given: {p.truncate}")
    ids = engine.tokenizer.encode(body.inputs, add_special_tokens=True)
    ids = ids[-p.truncate :] if p.truncate else ids
    new = p.max_new_tokens if p.max_new_tokens is not None else min(max(total - len(ids), 0), DEFAULT_NEW_TOKENS)
    if len(ids) + new > total:
        given = f"{len(ids)} `inputs` tokens and {new} `max_new_tokens`"
        raise _invalid(f"`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {given}")
    if len(ids) > longest:
        raise _invalid(f"`inputs` must have less than {longest} tokens. Given: {len(ids)}")
    warp = Warp(temperature=p.temperature or 1.0, top_k=p.top_k, top_p=p.top_p)
    sampled = p.do_sample or warp != Warp()
    named = limits.seed if p.seed is None else p.seed
    seed = (secrets.randbits(63) if named is None else named) if sampled else None
    full = full_text if p.return_full_text is None else p.return_full_text
    return Plan(body.inputs, ids, new, top_n, warp, seed, p.details, full, tuple(p.stop))
