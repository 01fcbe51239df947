"""Running an ASGI application under uvicorn: blocking, or in a thread for as long as a `with` block lasts."""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any, Self

import uvicorn

from uld_adapters.errors import ServerUnreachable, UsageError

START_SECONDS = 30.0


class _Server(uvicorn.Server):
    """A uvicorn server that says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()


def _bound(host: str, port: int) -> socket.socket:
    # Without the protocol's number asyncio leaves Nagle's algorithm on, and each event of a stream would wait 40 ms.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another port, or 0 for a free one") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(app: Any, log_level: str) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_level=log_level, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1, backlog=512
    )


def run(app: Any, *, host: str, port: int, log_level: str, on_ready: Callable[[str], None] | None) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    listener = _bound(host, port)
    url = _url(listener)
    with contextlib.closing(listener), contextlib.suppress(KeyboardInterrupt):
        _Server(_config(app, log_level), lambda: on_ready(url) if on_ready else None).run(sockets=[listener])


class EmulatorServer:
    """Serves an application in a thread: `with EmulatorServer(app) as server: ... server.url`; port 0 takes a free one."""

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0) -> None:
        self.app = app
        self.url = ""
        self._address = (host, port)
        self._listener: socket.socket | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen, and return when requests are answered."""
        ready = threading.Event()
        self._listener = _bound(*self._address)
        self.url = _url(self._listener)
        self._server = _Server(_config(self.app, "critical"), ready.set)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="emulator", daemon=True)
        self._thread.start()
        if not ready.wait(START_SECONDS):
            self.stop()
            raise ServerUnreachable(f"the emulator at {self.url} did not start in {START_SECONDS:.0f} s")
        return self

    def stop(self) -> None:
        """Close every connection and wait until the thread is done."""
        if self._server is not None and self._thread is not None and self._listener is not None:
            self._server.should_exit = True
            self._thread.join()
            self._listener.close()
        self._server = self._thread = self._listener = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
