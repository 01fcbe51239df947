"""Bodies of the OpenAI dialect, and what the real API says of one that it cannot read."""

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from uld_adapters.emulator.desk import Refusal
from uld_adapters.emulator.vllm_request import StreamOptions

Body = TypeVar("Body", bound="Common")


class Part(BaseModel):
    """A piece of a message's content; only text is emulated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; `prefix` is no part of the real API, others have it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    prefix: bool | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Common(BaseModel):
    """What both routes take; other fields are refused, as the real API does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class ChatRequest(Common):
    """A body of `/v1/chat/completions`; the last two fields are vLLM's."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Common):
    """A body of `/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None


def refusal(
    message: str, *, param: str | None = None, code: str | None = None, status: int = 400, kind: str = "invalid_request_error"
) -> Refusal:
    """An error in the real API's shape."""
    return Refusal(status, {"error": {"message": message, "type": kind, "param": param, "code": code}})


def no_model(name: str) -> Refusal:
    """The refusal of a model that is not served."""
    return refusal(f"The model `{name}` does not exist or you do not have access to it.", code="model_not_found", status=404)


DENIED = refusal("Incorrect API key provided.", code="invalid_api_key", status=401).body


async def body_of(request: Request, kind: type[Body]) -> Body:
    """Read a body, or refuse it."""
    try:
        data = json.loads(await request.body())
    except ValueError as error:
        raise refusal(f"We could not parse the JSON body of your request. ({error})") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _misfit(error.errors()[0]) from error


def _misfit(error: Any) -> Refusal:
    names = [part for part in error["loc"] if isinstance(part, int) or part.islower()]  # pydantic adds the names of its own types
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if error["type"] == "extra_forbidden":
        if len(names) == 1:
            return refusal(f"Unrecognized request argument supplied: {path}")
        return refusal(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    if error["type"] == "missing":
        if path == "model":
            return refusal("you must provide a model parameter")
        return refusal(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    return refusal(f"Invalid type or value for '{path}': {error['msg']}.", param=path, code="invalid_type")
