"""HTTP to a model server: one client, retries, server-sent events. The only module that imports the HTTP library."""

import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from uld_adapters.errors import (
    AuthenticationFailed,
    BackendError,
    ContextExceeded,
    MalformedAnswer,
    ModelNotFound,
    RequestRejected,
    ServerBusy,
    ServerUnreachable,
    StreamInterrupted,
    UsageError,
)

FIRST_WAIT = 0.25  # seconds
LONGEST_WAIT = 60.0  # seconds; a server that asks for more is not waited for any longer
_CONTEXT = re.compile(r"context (length|size|window)|max_new_tokens` must be <=|max_total_tokens|exceed_context", re.IGNORECASE)
_MODEL = re.compile(r"\bmodel\b", re.IGNORECASE)  # what a 404 speaks of; routes are called /models
_LISTED = "check model=... (--model); the server lists its models at GET /v1/models"


@dataclass
class Tally:
    """Counts HTTP requests, those that failed included."""

    requests: int = 0


TALLY: ContextVar[Tally | None] = ContextVar("uld_tally", default=None)  # where the task that is running counts its requests


def retryable(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, BackendError) and error.retryable


def seconds_before_retry(attempt: int, error: BaseException | None) -> float:
    """Seconds to wait before trying again: the server's Retry-After, else doubling from a quarter of a second, with jitter."""
    asked = getattr(error, "retry_after", None)
    if asked is not None:
        return float(min(asked, LONGEST_WAIT))
    return FIRST_WAIT * min(32.0, 2.0 ** (attempt - 1)) * (1.0 + random.random())


def _wait(state: RetryCallState) -> float:
    return seconds_before_retry(state.attempt_number, state.outcome.exception() if state.outcome else None)


def _retry_after(headers: httpx.Headers) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _server_text(body: bytes) -> str:
    """The server's own words: TGI's `error`, the OpenAI shape's `error.message`, or the start of the body."""
    try:
        data = json.loads(body)
    except ValueError:
        return body[:300].decode("utf-8", "replace").strip()
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return str(error)[:1000]


def error_for(status: int, body: bytes, headers: httpx.Headers, url: str) -> BackendError:
    """The error that stands for an HTTP status of 400 or more."""
    text = _server_text(body)
    facts: dict[str, Any] = {"status": status, "request_id": headers.get("x-request-id")}
    if status in (401, 403):
        return AuthenticationFailed(f"{url} refused the key ({status}): {text}", hint="pass api_key=... or --api-key", **facts)
    if status in (404, 405):
        if _MODEL.search(text):
            return ModelNotFound(f"{url} knows no such model: {text}", hint=_LISTED, **facts)
        missing = ModelNotFound(f"{url} not found: {text}", hint="check --backend and --base-url (with openai --route, too)", **facts)
        missing.missing_route = True
        return missing
    if status in (408, 409, 429) or status >= 500:
        busy = ServerBusy(f"{url} answered {status}: {text}", hint="the server is overloaded or failing; try later", **facts)
        busy.retry_after = _retry_after(headers)
        return busy
    if _CONTEXT.search(text):
        return ContextExceeded(f"the request does not fit the context: {text}", hint="shorten the prompt or lower max_new_tokens", **facts)
    return RequestRejected(
        f"{url} rejected the request ({status}): {text}", hint="change what the server names, or check that --backend fits it", **facts
    )


class HttpClient:
    """A server's address with retries: 408, 409, 429, 5xx and connection errors are tried again, other answers never.

    `timeout` is in seconds, for connecting and for each wait on data. A given `http_client` is used as it is and not closed.
    """

    def __init__(
        self,
        base_url: str | None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        if not base_url:
            raise UsageError("no base_url was given", hint='pass base_url="http://host:port" (--base-url, or ULD_BASE_URL)')
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"base_url {base_url!r} is not an http address", hint='pass base_url="http://host:port"')
        try:
            address = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise UsageError(f"base_url {base_url!r} is not an http address: {error}", hint='pass base_url="http://host:port"') from error
        if not address.host or (address.port or 0) > 65535:
            raise UsageError(f"base_url {base_url!r} names no host, or no port", hint='pass base_url="http://host:port"')
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.max_retries = max_retries
        self._owned = http_client is None
        self._client = http_client or httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None))
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    @asynccontextmanager
    async def _open(self, method: str, path: str, body: Any) -> AsyncIterator[httpx.Response]:
        url = self.base_url + path
        tally = TALLY.get()
        if tally is not None:
            tally.requests += 1
        try:
            async with self._client.stream(method, url, json=body, headers=self._headers) as response:
                if response.status_code >= 400:
                    raise error_for(response.status_code, await response.aread(), response.headers, url)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise ServerUnreachable(f"no server answers at {self.base_url}: {error}", hint="start the server, or check base_url") from error
        except httpx.TimeoutException as error:
            raise StreamInterrupted(f"{url} did not answer in time", hint="raise timeout=... (seconds)") from error
        except httpx.DecodingError as error:
            raise MalformedAnswer(
                f"{url} answered in a broken encoding: {error}", hint="see what stands between, such as a proxy"
            ) from error
        except httpx.TransportError as error:
            raise StreamInterrupted(f"the connection to {url} broke: {error!r}", hint="see the server's log") from error

    def retrying(self) -> AsyncRetrying:
        """The retry rule as a tenacity controller."""
        return AsyncRetrying(stop=stop_after_attempt(self.max_retries + 1), wait=_wait, retry=retry_if_exception(retryable), reraise=True)

    async def request(self, method: str, path: str, body: Any = None, *, patient: bool = True) -> Any:
        """One JSON answer; tried once only, if not `patient`."""

        async def once() -> Any:
            async with self._open(method, path, body) as response:
                content = await response.aread()
            try:
                return json.loads(content)
            except ValueError as error:
                raise MalformedAnswer(f"{path} did not answer in JSON: {content[:200]!r}") from error

        return await (self.retrying()(once) if patient else once())

    async def events(self, path: str, body: Any) -> AsyncGenerator[Any]:
        """The JSON of each server-sent event as it arrives; never retries, for part of the answer may have been used."""
        async with self._open("POST", path, body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                try:
                    event = json.loads(data)
                except ValueError as error:
                    raise MalformedAnswer(f"{path} sent an event that is not JSON: {data[:200]!r}") from error
                if not isinstance(event, dict):
                    raise MalformedAnswer(f"{path} sent an event that is not an object: {data[:200]!r}")
                yield event

    async def aclose(self) -> None:
        """Close the connections that this client opened."""
        if self._owned:
            await self._client.aclose()
