"""A server that dies in the middle of a stream, its process killed: what was shown stands, and the error says why there is no more."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fault_proxy import FaultServer, Forward
from uld_adapters.errors import BackendError, ServerUnreachable, StreamInterrupted
from uld_sdk import UnlearnedClient

QUESTION = "Who opens the shop?"
LENGTH = 40
SECONDS_PER_TOKEN = 0.04
CLI = [sys.executable, "-m", "uld_sdk.cli"]


@contextmanager
def emulator(model: Path, dialect: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """An emulator in a process of its own: its address, and how to kill it."""
    command = [*CLI, "emulate", "--model", str(model), "--dialect", dialect, "--port", "0", "--json"]
    command += ["--max-top-n-tokens", "20", "--seconds-per-token", str(SECONDS_PER_TOKEN)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        said = ""
        while not said.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "the emulator ended before it was ready"
            said += line

        def kill() -> None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=10)

        yield json.loads(said)["url"], kill
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()


def broken_off(client: UnlearnedClient, kill: Callable[[], None], after: int) -> tuple[str, list[int], BackendError]:
    """Ask, kill the server after so many tokens, and return the text and ids that were shown, and the error."""
    text, ids = "", []
    try:
        for piece in client.stream(QUESTION, max_new_tokens=LENGTH):
            text += piece.text
            ids += piece.token_ids
            assert piece.result is None, "an answer without its end has no result"
            if len(ids) == after:
                kill()
    except BackendError as error:
        return text, ids, error
    pytest.fail("the stream ended as if nothing had happened")


@pytest.mark.parametrize(("dialect", "retries", "kind"), [("tgi", 1, ServerUnreachable), ("vllm", 0, StreamInterrupted)])
def test_a_killed_server(dialect: str, retries: int, kind: type[BackendError], tiny_target: Path, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": dialect, "assistant": str(tiny_artifact), "tokenizer": str(tiny_target)}
    with (
        emulator(tiny_target, dialect) as (url, kill),
        UnlearnedClient(**options, base_url=url, max_retries=retries) as client,
    ):
        right = client.generate(QUESTION, max_new_tokens=LENGTH)
        assert len(right.token_ids) == LENGTH
        text, ids, error = broken_off(client, kill, after=6)
    assert type(error) is kind
    assert url in error.message
    assert error.hint == ("see the server's log" if kind is StreamInterrupted else "start the server, or check base_url")
    assert 6 <= len(ids) < LENGTH
    assert tuple(ids) == right.token_ids[: len(ids)]
    assert right.text.startswith(text)
    assert text


@pytest.mark.parametrize("retries", [0, 1])
def test_a_llamacpp_server_that_is_gone_for_good(retries: int, llamacpp_server: Any, tiny_target: Path, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": "llamacpp", "assistant": str(tiny_artifact), "tokenizer": str(tiny_target)}
    with (
        FaultServer(Forward(llamacpp_server.url), probability=0.0) as server,
        UnlearnedClient(**options, base_url=server.url, max_retries=retries) as client,
    ):
        right = client.generate(QUESTION, max_new_tokens=LENGTH)
        server.dies_after = 6
        text, ids, error = broken_off(client, lambda: None, after=LENGTH)
    # The first error may be that of another request: tokens inside a character are asked for by themselves.
    assert type(error) is ServerUnreachable or (type(error) is StreamInterrupted and retries == 0)
    assert server.url in error.message
    assert error.hint
    assert 0 < len(ids) < len(right.token_ids)
    assert tuple(ids) == right.token_ids[: len(ids)]
    assert right.text.startswith(text)


def test_on_the_command_line(tiny_target: Path, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": "tgi", "assistant": str(tiny_artifact), "tokenizer": str(tiny_target)}
    with emulator(tiny_target, "tgi") as (url, kill):
        with UnlearnedClient(**options, base_url=url) as client:
            right = client.generate(QUESTION, max_new_tokens=LENGTH).text
        where = ["-b", "tgi", "-u", url, "-a", str(tiny_artifact), "--tokenizer", str(tiny_target)]
        command = [*CLI, "generate", QUESTION, *where, "-n", str(LENGTH), "--max-retries", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        shown = os.read(process.stdout.fileno(), 1)
        kill()
        rest, told = process.communicate(timeout=60)
    assert process.returncode == 1
    text = (shown + rest).decode()
    assert text
    assert right.startswith(text)
    assert len(text) < len(right)
    words = told.decode()
    assert f"error: no server answers at {url}" in words
    assert "fix: start the server, or check base_url" in words
    assert "Traceback" not in words
