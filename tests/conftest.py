"""Fixtures of the whole test run: one tiny model, one assistant trained for it, and the servers that serve the model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from tiny_rows import FORGET, RETAIN, write_rows

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub; a name that is no folder must fail at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "100"
for name in ("ULD_BACKEND", "ULD_BASE_URL", "ULD_API_KEY", "ULD_ASSISTANT", "ULD_DEBUG"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with its tokenizer: the large model of the tests, and the assistant's base."""
    return tiny.tiny_model(tmp_path_factory.mktemp("models") / "tiny-target")


@pytest.fixture(scope="session")
def tiny_gguf(tiny_target: Path) -> Path:
    """The same model as one GGUF file, for llama.cpp."""
    from tiny_gguf import write_gguf

    return write_gguf(tiny_target, tiny_target.parent / "tiny-target.gguf")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A forget and a retain file."""
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "forget.jsonl", FORGET), write_rows(folder / "retain.jsonl", RETAIN)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an assistant that was trained for the tiny target for a few steps."""
    from uld_sdk.training import train

    forget, retain = tiny_data
    output = tmp_path_factory.mktemp("artifacts") / "tiny-assistant"
    data = {"forget": str(forget), "retain": str(retain)}
    train(base=str(tiny_target), **data, output=str(output), steps=30, device="cpu", dtype="float32", progress=False)
    return output


def emulated(model: Path, **options: Any) -> Iterator[Any]:
    """A running emulator."""
    from uld_adapters.emulator import EmulatorServer, build_app

    with EmulatorServer(build_app(model, **options)) as server:
        yield server


@pytest.fixture(scope="session")
def tgi_server(tiny_target: Path) -> Iterator[Any]:
    """The tiny target behind TGI's dialect, started with `--max-top-n-tokens 20`; `.url` is its address."""
    yield from emulated(tiny_target, dialect="tgi", max_top_n_tokens=20)


@pytest.fixture(scope="session")
def vllm_server(tiny_target: Path) -> Iterator[Any]:
    """The tiny target behind vLLM's dialect."""
    yield from emulated(tiny_target, dialect="vllm")


@pytest.fixture(scope="session")
def openai_server(tiny_target: Path) -> Iterator[Any]:
    """The tiny target behind the OpenAI dialect, which continues no answer of a conversation."""
    yield from emulated(tiny_target, dialect="openai")


@pytest.fixture(scope="session")
def llamacpp_server(tiny_gguf: Path) -> Iterator[Any]:
    """The tiny target behind a real llama.cpp server."""
    from uld_sdk.demo.server import LlamaCppServer

    with LlamaCppServer(tiny_gguf, parallel=2, context=512) as server:
        yield server
