"""A real vLLM server on the CPU (make test-vllm): the same answers as the emulator of its dialect, and as a local model."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.vocabulary.tokens import load_tokenizer
from uld_sdk import ContextExceeded, ModelNotFound, UnlearnedClient, cache, train

pytestmark = pytest.mark.vllm
READY_SECONDS = 300.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
QUESTIONS = [row["question"] for row in [*FORGET, *RETAIN]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads have 32 dimensions, as vLLM's CPU attention wants."""
    return tiny.tiny_model(tmp_path_factory.mktemp("vllm") / "target", hidden=128)


@pytest.fixture(scope="module")
def url(target: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = os.environ.get("ULD_VLLM", "vllm")
    command = [program, "serve", str(target), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    log = (target.parent / "vllm.log").open("w", encoding="utf-8")
    server = subprocess.Popen([*command, "--enforce-eager"], env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(address, server, target.parent / "vllm.log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
        log.close()


def wait_until_ready(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"vLLM ended at once:\n{log.read_text(encoding='utf-8')[-3000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"vLLM was not ready in {READY_SECONDS:.0f} s:\n{log.read_text(encoding='utf-8')[-3000:]}")


@pytest.fixture(scope="module")
def assistant(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm-data")
    data = {"forget": str(write_rows(folder / "f.jsonl", FORGET)), "retain": str(write_rows(folder / "r.jsonl", RETAIN))}
    return train(base=str(target), **data, output=str(folder / "assistant"), steps=30, device="cpu", dtype="float32", progress=False).path


def test_the_plain_remote_says_what_the_model_says(url: str, target: Path) -> None:
    with (
        UnlearnedClient(backend="vllm", base_url=url, tokenizer=str(target)) as remote,
        UnlearnedClient(backend="hf", model=str(target)) as local,
    ):
        for question in QUESTIONS:
            assert remote.generate(question, max_new_tokens=32).token_ids == local.generate(question, max_new_tokens=32).token_ids


@pytest.mark.parametrize("draft", ["stream", 1, 7, 32])
def test_unlearned_answers_equal_those_of_a_local_model(url: str, target: Path, assistant: Path, draft: str | int) -> None:
    with (
        UnlearnedClient(backend="vllm", base_url=url, assistant=str(assistant), draft=draft) as remote,
        UnlearnedClient(backend="hf", model=str(target), assistant=str(assistant), top_logprobs=20) as local,
    ):
        for question in QUESTIONS:
            ours, theirs = remote.generate(question, max_new_tokens=32), local.generate(question, max_new_tokens=32)
            assert ours.text == theirs.text
            assert ours.untouched == theirs.untouched


def test_the_emulator_answers_as_vllm_does(url: str, target: Path, assistant: Path) -> None:
    from uld_adapters.emulator import EmulatorServer, build_app

    with (
        EmulatorServer(build_app(target, dialect="vllm")) as emulator,
        UnlearnedClient(backend="vllm", base_url=url, assistant=str(assistant)) as real,
        UnlearnedClient(backend="vllm", base_url=emulator.url, assistant=str(assistant)) as emulated,
    ):
        assert real.capabilities.top_logprobs == emulated.capabilities.top_logprobs
        assert real.capabilities.context == emulated.capabilities.context
        for question in QUESTIONS:
            ours, theirs = real.generate(question, max_new_tokens=24), emulated.generate(question, max_new_tokens=24)
            assert ours.token_ids == theirs.token_ids
            assert (ours.report.requests, ours.report.changed) == (theirs.report.requests, theirs.report.changed)
        for temperature in (0.8, 1.0):
            drawn = real.generate(QUESTIONS[0], temperature=temperature, seed=3, max_new_tokens=24)
            assert drawn.text == emulated.generate(QUESTIONS[0], temperature=temperature, seed=3, max_new_tokens=24).text


def test_scores_agree_with_a_local_model(url: str, target: Path, assistant: Path) -> None:
    with (
        UnlearnedClient(backend="vllm", base_url=url, assistant=str(assistant)) as remote,
        UnlearnedClient(backend="hf", model=str(target), assistant=str(assistant)) as local,
    ):
        for row in FORGET:
            there, here = remote.score(row["question"], row["answer"]), local.score(row["question"], row["answer"])
            assert there.token_ids == here.token_ids
            for low, high, low_here, high_here in zip(there.lower, there.upper, here.lower, here.upper, strict=True):
                assert low - 1e-2 <= high_here
                assert low_here - 1e-2 <= high


def test_cached_log_probabilities_are_those_of_a_local_model(url: str, target: Path, tmp_path: Path) -> None:
    from uld_offset_models.data import read_rows
    from uld_offset_models.encoding import encode
    from uld_offset_models.target_cache import TargetCache

    options: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "refusals": "built-in", "base": str(target), "top_logprobs": 20}
    remote = cache(output=tmp_path / "remote", backend="vllm", base_url=url, **options)
    cache(output=tmp_path / "local", backend="hf", model=str(target), **options)
    assert remote.texts == remote.scored == 2 * len(FORGET) + len(RETAIN)
    there, here = TargetCache.open(tmp_path / "remote"), TargetCache.open(tmp_path / "local")
    examples = [row.example for row in read_rows([*FORGET, *RETAIN])]
    for row in encode(load_tokenizer(str(target)), examples, chat_template=True, max_length=512):
        ours, theirs = there.find(row.prompt, row.answer), here.find(row.prompt, row.answer)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-2)
        np.testing.assert_allclose(ours.label, theirs.label, atol=1e-2)
        np.testing.assert_allclose(ours.tail, theirs.tail, atol=1e-2)


def test_what_is_wrong_is_said(url: str, target: Path) -> None:
    with UnlearnedClient(backend="vllm", base_url=url, model="another", tokenizer=str(target)) as client, pytest.raises(ModelNotFound):
        client.generate("Who opens the shop?")
    with UnlearnedClient(backend="vllm", base_url=url, tokenizer=str(target)) as client, pytest.raises(ContextExceeded):
        client.generate("Who opens the shop?", max_new_tokens=2000)


def test_the_command_line_inspects_it(url: str, assistant: Path) -> None:
    from typer.testing import CliRunner

    from uld_sdk.cli import app

    told = CliRunner().invoke(app, ["inspect", "-b", "vllm", "-u", url, "-a", str(assistant), "--json"])
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["fits"] is True
