"""Beside a large model whose tokenizer is closed: one spelling a token, which is approximate and says so."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from tiny_rows import FORGET
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.errors import ContinuationUnavailable, TokenizerMismatch
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer
from uld_sdk import UnlearnedClient, train
from uld_sdk.aligning import ApproximateWarning
from uld_sdk.cli import app

QUESTION = "Who wrote the book about the sea?"
ASKED = [row["question"] for row in FORGET]


@pytest.fixture(scope="module")
def closed(tiny_target: Path) -> Vocabulary:
    """The large model's tokens, and nothing of how it splits text."""
    known = Vocabulary.from_hf(load_tokenizer(tiny_target))
    return Vocabulary.from_bytes(known.tokens, control=known.roles, name="closed")


@pytest.fixture(scope="module")
def assistant(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("path")
    base = tiny.tiny_model(folder / "base", vocab_size=330, seed=4)
    forget, retain = map(str, tiny_data)
    run: dict[str, Any] = {"steps": 40, "learning_rate": 0.01, "device": "cpu", "dtype": "float32", "progress": False}
    return train(base=str(base), forget=forget, retain=retain, output=str(folder / "assistant"), alpha=1.5, margin=1.0, **run).path


@pytest.fixture(scope="module")
def continuing(tiny_target: Path) -> Iterator[Any]:
    with EmulatorServer(build_app(tiny_target, dialect="openai", prefill="plain")) as server:
        yield server


def test_a_closed_tokenizer_is_read_along_a_path(
    continuing: Any, closed: Vocabulary, assistant: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    monkeypatch.setenv("ULD_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, logger="uld_sdk")
    remote: dict[str, Any] = {"backend": "openai", "base_url": f"{continuing.url}/v1", "tokenizer": closed, "assistant": str(assistant)}
    for _ in range(2):  # the second time the verdict comes from the cache
        with UnlearnedClient(**remote, alpha=1e-6, margin=0.0) as client:
            with pytest.warns(ApproximateWarning, match=r"not known how closed splits text.*tokenizer="):
                result = client.generate(QUESTION, max_new_tokens=12)
            assert not client.capabilities.continues
            assert "not known how the server splits text" in client.capabilities.notes[0]
        assert result.report.alignment == "path"
        assert result.report.positions == 12
        assert 0 < result.report.positions - result.report.untouched
    assert "the assistant reads the large model's tokens by path" in caplog.messages


def test_what_leaves_a_client_beside_a_closed_tokenizer(continuing: Any, closed: Vocabulary, assistant: Path) -> None:
    remote: dict[str, Any] = {"backend": "openai", "base_url": f"{continuing.url}/v1", "tokenizer": closed, "assistant": str(assistant)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximateWarning)
        with UnlearnedClient(**remote, margin=50.0) as client:
            own = client.generate(QUESTION, max_new_tokens=12)
        assert own.untouched
        with UnlearnedClient(**remote, alpha=13.0, margin=0.0, filter=0.0) as client:
            first = client.generate(QUESTION, max_new_tokens=1)
            assert first.report.largest_bound == 1.0, "nothing bounds what one spelling leaves out"
            with pytest.raises(ContinuationUnavailable, match="on_touched='refuse'"):
                client.generate_many(ASKED, max_new_tokens=24)
        with UnlearnedClient(**remote, margin=0.0, on_touched="refuse") as client:
            assert client.generate(QUESTION, max_new_tokens=12).finish_reason == "refusal"


def test_a_path_on_request(vllm_server: Any, tiny_target: Path, assistant: Path, tiny_artifact: Path) -> None:
    remote: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "tokenizer": str(tiny_target)}
    for folder, mode in ((assistant, "bridge"), (tiny_artifact, "identity")):
        with UnlearnedClient(**remote, assistant=str(folder)) as client, warnings.catch_warnings():
            warnings.simplefilter("error", ApproximateWarning)
            assert client.generate(QUESTION, max_new_tokens=4).report.alignment == mode
        with (
            UnlearnedClient(**remote, assistant=str(folder), alignment="path") as client,
            pytest.warns(ApproximateWarning, match="alignment='path' reads one spelling") as caught,
        ):
            assert client.generate(QUESTION, max_new_tokens=4).report.alignment == "path"
        assert "tokenizer=" not in str(caught[0].message), "the tokenizer is known"


def test_a_path_from_the_command_line(vllm_server: Any, tiny_target: Path, assistant: Path) -> None:
    said = ["generate", QUESTION, "-b", "vllm", "-u", vllm_server.url, "--tokenizer", tiny_target, "-a", assistant, "-n", 6]
    outcome = CliRunner().invoke(app, [str(word) for word in [*said, "--alignment", "path", "--json"]], prog_name="uld-sdk")
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["report"]["alignment"] == "path"
    assert "approximate" in outcome.stderr
    wrong = CliRunner().invoke(app, [str(word) for word in [*said, "--alignment", "paths"]], prog_name="uld-sdk")
    assert wrong.exit_code == 2
    assert "alignment is 'paths'" in wrong.stderr


def test_an_assistant_that_changes_texts_is_refused_beside_a_closed_tokenizer(
    continuing: Any, closed: Vocabulary, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tiny.lowering(tiny.tiny_model(tmp_path / "base", vocab_size=330))
    forget, retain = map(str, tiny_data)
    lower = train(base=str(base), forget=forget, retain=retain, output=str(tmp_path / "lower"), steps=1, device="cpu", progress=False).path
    with (
        UnlearnedClient(backend="openai", base_url=f"{continuing.url}/v1", tokenizer=closed, assistant=str(lower)) as client,
        pytest.raises(TokenizerMismatch, match="changes every text") as caught,
    ):
        client.generate(QUESTION, max_new_tokens=2)
    assert f"the small model's tokenizer {lower} beside closed" in str(caught.value)
    assert "byte-level BPE" in caught.value.hint
