"""A small HTTP/1.1 host for an ASGI app that spoils some of its answers, chosen by a seeded random generator.

    with FaultServer(app, probability=0.3, seed=1) as server:
        ...  # talk to server.url
    server.faults  # how often each kind struck

A spoiled answer is first computed to its end and then changed; the others pass through as they are written. `Forward(url)`
as the app puts the faults in front of a server that runs elsewhere.
"""

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import httpx2 as httpx

KINDS = (
    "drop_before",  # the connection is reset before the first byte
    "drop_after",  # ... somewhere inside the answer
    "busy",  # 5xx with Retry-After: 0
    "broken",  # 5xx without it
    "cut_json",  # the answer ends cleanly inside a JSON value
    "early_end",  # the answer ends cleanly before its last events
    "missing_logprobs",  # the field is gone, at one position or at all
    "null_logprobs",  # ... or null
    "doubled_event",
    "dropped_event",
    "swapped_events",
    "error_event",  # the server reports an error in the middle of a stream
    "empty",  # 200 and nothing else
)
FAST_KINDS = tuple(kind for kind in KINDS if kind != "broken")  # a client waits a moment after a 5xx without Retry-After


class Dropped(Exception):
    """The connection is to be reset."""


class Forward:
    """An app that hands every request on to the server at `url`, and its answer back as it comes."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        headers = {key.decode(): value.decode() for key, value in scope["headers"] if key in (b"authorization", b"content-type")}
        async with (
            httpx.AsyncClient(timeout=60.0, verify=False) as client,
            client.stream(scope["method"], self.url + scope["path"], content=body, headers=headers) as answer,
        ):
            kept = [(key, value) for key, value in answer.headers.raw if key.lower() in (b"content-type", b"retry-after")]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
            async for piece in answer.aiter_bytes():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class FaultServer:
    """Serves `app` on a free port of 127.0.0.1; `probability` may be changed at any time, `only` limits the paths.

    With `dies_after` set to n, the server resets the connection after n pieces of a streamed answer and is gone for good.
    """

    def __init__(
        self, app: Any, *, probability: float = 0.3, seed: int = 0, kinds: Sequence[str] = FAST_KINDS, only: Sequence[str] | None = None
    ) -> None:
        self.app = app
        self.probability = probability
        self.kinds = tuple(kinds)
        self.only = None if only is None else frozenset(only)
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.dies_after: int | None = None
        self.url = ""
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fault-server", daemon=True)
        self._thread.start()
        if not self._ready.wait(30):
            raise RuntimeError("the fault server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._connection, sock=listener, backlog=512)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        await self._refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # let aborted transports close

    async def _refuse(self) -> None:
        """Close the listening socket; a connection that was accepted this moment must reach its server first, or asyncio loses it."""
        assert self._server is not None
        for listener in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        await asyncio.sleep(0)
        self._server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except Dropped:
            writer.transport.abort()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()  # the server stops: nobody waits for this task's outcome
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = [(k.strip().lower().encode(), v.strip().encode()) for k, v in (line.split(":", 1) for line in lines)]
        body = await reader.readexactly(int(dict(headers).get(b"content-length", b"0")))
        path, _, query = target.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": headers, "state": {},
        }  # fmt: skip
        self.requests += 1
        kind = None
        if (self.only is None or path in self.only) and self._random.random() < self.probability:
            kind = self._random.choice(self.kinds)
        if kind is None:
            await self._pass(scope, body, reader, writer)
        else:
            self.faults[kind] += 1
            await self._spoil(kind, scope, body, writer)
        return True

    async def _pass(self, scope: dict[str, Any], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            while not reader.at_eof():  # the next request never comes before this one's answer
                await reader._wait_for_data("receive")  # type: ignore[attr-defined]
            return {"type": "http.disconnect"}

        pieces = 0

        async def send(message: dict[str, Any]) -> None:
            nonlocal pieces
            if message["type"] == "http.response.start":
                writer.write(_head(message["status"], message["headers"]))
            else:
                pieces += message.get("body", b"").startswith(b"data:")
                if self.dies_after is not None and pieces > self.dies_after:
                    await self._refuse()
                    raise Dropped
                writer.write(_chunk(message.get("body", b"")) + (b"" if message.get("more_body") else b"0\r\n\r\n"))
            await writer.drain()

        await self.app(scope, receive, send)

    async def _spoil(self, kind: str, scope: dict[str, Any], body: bytes, writer: asyncio.StreamWriter) -> None:
        if kind == "drop_before":
            raise Dropped
        if kind in ("busy", "broken"):
            again = [(b"retry-after", b"0")] if kind == "busy" else []
            writer.write(_head(self._random.choice((500, 502, 503, 504)), again) + _chunk(b"spoiled") + b"0\r\n\r\n")
            await writer.drain()
            return
        messages: list[dict[str, Any]] = []
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(given, None)
            return message if message is not None else await asyncio.Future()

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        await self.app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in messages[1:])
        streamed = dict(messages[0]["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        spoiled = self._events(kind, content) if streamed else self._json(kind, content)
        data = _head(messages[0]["status"], messages[0]["headers"])
        if kind == "drop_after":
            writer.write(data + _chunk(content[: self._random.randrange(len(content) + 1)]))
            await writer.drain()
            await asyncio.sleep(0)
            raise Dropped
        writer.write(data + _chunk(spoiled) + b"0\r\n\r\n")
        await writer.drain()

    def _events(self, kind: str, content: bytes) -> bytes:
        """A stream of events with one fault in it."""
        events = [event for event in content.split(b"\n\n") if event]
        at = self._random.randrange(len(events))
        if kind == "empty":
            return b""
        if kind == "cut_json":
            events = [*events[:at], events[at][: self._random.randrange(len(events[at]))]]
            return b"\n\n".join(events) + self._random.choice((b"", b"\n\n"))
        if kind == "early_end":
            events = events[:at]
        elif kind == "doubled_event":
            events.insert(at, events[at])
        elif kind == "dropped_event":
            del events[at]
        elif kind == "swapped_events" and len(events) > 1:
            other = self._random.randrange(len(events) - 1)
            events[other], events[other + 1] = events[other + 1], events[other]
        elif kind == "error_event":
            vllm = {"error": {"message": "spoiled", "type": "InternalServerError", "param": None, "code": 500}}
            tgi = {"error": "Request failed during generation: spoiled", "error_type": "generation"}
            events = [*events[:at], b"data:" + json.dumps(vllm if events[0].startswith(b"data: ") else tgi).encode()]
        elif kind in ("missing_logprobs", "null_logprobs"):
            everywhere = self._random.random() < 0.5
            events = [self._without_logprobs(kind, event) if everywhere or i == at else event for i, event in enumerate(events)]
        return b"".join(event + b"\n\n" for event in events)

    def _json(self, kind: str, content: bytes) -> bytes:
        """One JSON answer with a fault; faults that only a stream can have become a cut."""
        if kind == "empty":
            return b""
        if kind in ("missing_logprobs", "null_logprobs"):
            try:
                data = json.loads(content)
            except ValueError:
                return content
            return json.dumps(_spoil_logprobs(kind, data, self._random)).encode()
        return content[: self._random.randrange(len(content))] if content else content

    def _without_logprobs(self, kind: str, event: bytes) -> bytes:
        prefix, _, text = event.partition(b":")
        try:
            data = json.loads(text)
        except ValueError:
            return event
        return prefix + b":" + json.dumps(_spoil_logprobs(kind, data, self._random)).encode()


def _spoil_logprobs(kind: str, data: Any, rng: random.Random) -> Any:
    """Take log-probabilities out of an answer of any dialect, or put null in their place."""
    if isinstance(data, list):
        return [_spoil_logprobs(kind, item, rng) for item in data]
    if not isinstance(data, dict):
        return data
    result: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("logprobs", "top_tokens", "completion_probabilities"):
            if kind == "missing_logprobs":
                continue
            if isinstance(value, dict) and "content" in value and rng.random() < 0.5:
                result[key] = value | {"content": _nulls(value["content"])}
            elif isinstance(value, dict) and rng.random() < 0.5:
                result[key] = value | {"top_logprobs": [None for _ in value.get("top_logprobs") or []]}
            elif isinstance(value, list) and rng.random() < 0.5:
                result[key] = _nulls(value)
            else:
                result[key] = None
        elif key in ("choices", "details"):
            result[key] = _spoil_logprobs(kind, value, rng)
        else:
            result[key] = value
    return result


def _nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulls(item) for item in value]
    return value | {"logprob": None, "top_logprobs": _nulls(value.get("top_logprobs"))} if isinstance(value, dict) else value


def _head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    kept = [(k, v) for k, v in headers if k.lower() not in (b"content-length", b"transfer-encoding")]
    lines = [f"HTTP/1.1 {status} Status".encode(), *(k + b": " + v for k, v in kept), b"transfer-encoding: chunked"]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n" if data else b""
