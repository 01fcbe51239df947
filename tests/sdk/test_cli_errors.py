"""Bad input on the command line: a message with its fix on stderr, the right exit code, nothing on stdout, no traceback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from tiny_rows import RETAIN, write_rows
from uld_sdk.cli import app

QUESTION = "Who opens the shop?"


def refused(*arguments: object, code: int, input: str | None = None) -> str:
    """Run a command that must fail with this code, and return its message."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, prog_name="uld-sdk")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert outcome.exit_code == code, outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    return outcome.stderr


@pytest.fixture(scope="module")
def serving(tiny_target: Path) -> Iterator[Any]:
    """Starts emulators of the tiny target with options of a test's own."""
    from contextlib import ExitStack

    from uld_adapters.emulator import EmulatorServer, build_app

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(EmulatorServer(build_app(tiny_target, **options))).url


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "hi", "--basurl", "x"], "--base-url"),
        (["generat", "hi"], "generate"),
        (["generate"], "give a prompt or --input"),
        (["generate", "hi"], "--backend tgi"),
        (["generate", "hi", "-b", "tgi", "-n", "0"], "max-new-tokens"),
        (["generate", "hi", "-b", "tgi", "--top-p", "1.5"], "top-p"),
        (["generate", "hi", "-b", "tgi", "-t", "warm"], "--temperature"),
        (["generate", "--input", "missing.jsonl", "-b", "tgi"], "missing.jsonl"),
        (["generate", "hi", "-b", "tgj", "-u", "http://127.0.0.1:1"], "did you mean 'tgi'"),
        (["generate", "hi", "-b", "tgi"], 'no base_url was given\n  fix: pass base_url="http://host:port" (--base-url, or ULD_BASE_URL)'),
        (["generate", "hi", "-b", "tgi", "-u", ""], "no base_url was given"),
        (["generate", "hi", "-b", "hf"], "none was named\n  fix: pass model=... (--model)"),
        (["generate", "hi", "-b", "hf", "-m", "x", "-u", "http://host"], "leave base_url out"),
        (["generate", "hi", "-b", "tgi", "-u", "http://127.0.0.1:1", "--draft", "often"], "draft"),
        (["generate", "hi", "-b", "tgi", "-u", "http://127.0.0.1:1", "--on-touched", "shrug"], "refuse"),
        (["generate", "-", "-b", "tgi", "-u", "http://127.0.0.1:1"], "the prompt is empty"),
        (["generate", "hi", "-b", "tgi", "-u", "http://[::1"], "not an http address"),
        (["generate", "hi", "-b", "tgi", "-u", "http://127.0.0.1:1", "--api-key", "schlüssel"], "api_key"),
        (["generate", "hi", "-b", "tgi", "-u", "http://127.0.0.1:1", "--seed", str(2**63)], "seed"),
        (["generate", "hi", "-b", "tgi", "-u", "http://127.0.0.1:1", "--seed", "-1"], "seed"),
        (["generate", "hi", "-b", "tgi", "-u", "http://127.0.0.1:1", "--target-device", "cuda"], "target_device"),
        (["generate", "hi", "-b", "hf", "-m", "x", "--target-dtype", "int8"], "bfloat16"),
        (["inspect"], "nothing to inspect"),
        (["emulate", "--model", "x", "--dialect", "tgl"], "did you mean 'tgi'"),
        (["emulate"], "--model"),
        (["train", "--forget", "f.jsonl"], "--base"),
        (["train", "--steps", "-1"], "steps"),
        (["train", "--recipe", "missing.yaml"], "missing.yaml"),
        (["train", "--seed", str(2**32)], "seed"),
        (["demo", "--preset", "gatde"], "did you mean 'gated'"),
    ],
)
def test_a_wrong_command_exits_with_2(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments, code=2, input="" if "-" in arguments else None)


def test_nothing_listens_there(tiny_target: Path) -> None:
    told = refused("generate", QUESTION, "-b", "vllm", "-u", "http://127.0.0.1:9", "--tokenizer", tiny_target, "--max-retries", 0, code=1)
    assert "http://127.0.0.1:9" in told
    assert "fix:" in told


@pytest.mark.parametrize("dialect", ["tgi", "vllm"])
def test_a_wrong_key(serving: Any, tiny_target: Path, dialect: str) -> None:
    url = serving(dialect=dialect, api_key="secret-key")
    told = refused("generate", QUESTION, "-b", dialect, "-u", url, "--tokenizer", tiny_target, "--api-key", "wrong", code=1)
    assert "key" in told.lower()
    assert "secret-key" not in told
    right = CliRunner().invoke(
        app, ["generate", QUESTION, "-b", dialect, "-u", url, "--tokenizer", str(tiny_target), "-n", "4"], env={"ULD_API_KEY": "secret-key"}
    )
    assert right.exit_code == 0, right.stderr


def test_a_model_that_is_not_served(vllm_server: Any, tiny_target: Path) -> None:
    told = refused("generate", QUESTION, "-b", "vllm", "-u", vllm_server.url, "-m", "another", "--tokenizer", tiny_target, code=1)
    assert "another" in told


@pytest.mark.parametrize("dialect", ["tgi", "vllm"])
def test_a_server_without_log_probabilities(serving: Any, tiny_target: Path, dialect: str) -> None:
    url = serving(dialect=dialect, logprobs=False)
    told = refused("generate", QUESTION, "-b", dialect, "-u", url, "--tokenizer", tiny_target, code=1)
    assert ("--max-top-n-tokens" if dialect == "tgi" else "log-probabilities") in told


def test_a_cap_below_k_is_a_warning(serving: Any, tiny_artifact: Path) -> None:
    url = serving(dialect="tgi", max_top_n_tokens=5)
    arguments = ["generate", QUESTION, "-b", "tgi", "-u", url, "-a", str(tiny_artifact), "-n", "8", "--top-logprobs", "20", "--json"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert "warning: " in outcome.stderr
    assert "top 5" in outcome.stderr
    assert json.loads(outcome.stdout)["report"]["top_logprobs"] == 5


def test_an_answer_longer_than_the_context(vllm_server: Any, tiny_artifact: Path) -> None:
    told = refused("generate", QUESTION, "-b", "vllm", "-u", vllm_server.url, "-a", tiny_artifact, "-n", 5000, code=1)
    assert "context" in told


def test_an_artifact_for_another_tokenizer(serving: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    from uld_adapters.emulator import EmulatorServer, build_app

    other = tiny.tiny_model(tmp_path / "other", vocab_size=350)
    with EmulatorServer(build_app(other, dialect="vllm")) as server:
        told = refused("generate", QUESTION, "-b", "vllm", "-u", server.url, "-a", tiny_artifact, "-n", 8, code=1)
        assert "token" in told
        both = ["-b", "vllm", "-u", server.url, "--tokenizer", str(other), "-a", str(tiny_artifact)]
        outcome = CliRunner().invoke(app, ["inspect", *both, "--json"])
    assert json.loads(outcome.stdout)["fits"] is True, "named, the other tokenizer is bridged"


def test_an_artifact_for_another_base(vllm_server: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    other = tiny.tiny_model(tmp_path / "other", seed=7)
    told = refused("generate", QUESTION, "-b", "vllm", "-u", vllm_server.url, "-a", tiny_artifact, "--assistant-base", other, code=1)
    assert "SHA-256" in told
    assert "--assistant-base" in told


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing"])
def test_a_damaged_artifact(vllm_server: Any, tiny_artifact: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(tiny_artifact, tmp_path / "copy"))
    file = copy / "adapter_model.safetensors"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-40] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    told = refused("generate", QUESTION, "-b", "vllm", "-u", vllm_server.url, "-a", copy, "-n", 8, code=1)
    assert "adapter_model.safetensors" in told
    outcome = CliRunner().invoke(app, ["inspect", "-a", str(copy)])
    assert outcome.exit_code == 1
    assert "does not fit" in outcome.stdout


def test_a_folder_that_is_no_artifact(vllm_server: Any, tmp_path: Path) -> None:
    assert "uld.json" in refused("generate", QUESTION, "-b", "vllm", "-u", vllm_server.url, "-a", tmp_path, code=1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [("", "no prompts"), ('"fine"\n{broken\n', "line 2"), ('{"text": "x"}\n', "line 1"), ('"fine"\n\n7\n', "line 3")],
)
def test_a_malformed_prompt_file(tiny_target: Path, tmp_path: Path, rows: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(rows, encoding="utf-8")
    told = refused("generate", "--input", file, "-b", "hf", "-m", tiny_target, code=1)
    assert words in told


@pytest.mark.parametrize(
    ("rows", "words"),
    [("", "forget.jsonl"), ('{"question": "Who?", "answer": "He."}\n{"question": \n', "forget.jsonl:2"), ('{"a": 1}\n', "forget.jsonl:1")],
)
def test_a_malformed_forget_set(tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path, rows: str, words: str) -> None:
    file = tmp_path / "forget.jsonl"
    file.write_text(rows, encoding="utf-8")
    told = refused("train", "--base", tiny_target, "--forget", file, "--retain", tiny_data[1], "-o", tmp_path / "out", code=1)
    assert words in told
    assert not (tmp_path / "out").exists()


def test_a_forget_set_that_overlaps_the_retain_set(tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", RETAIN[:1])
    told = refused("train", "--base", tiny_target, "--forget", forget, "--retain", tiny_data[1], "-o", tmp_path / "out", code=1)
    assert RETAIN[0]["question"] in told


def test_a_device_that_is_not_there(tiny_target: Path, tiny_artifact: Path) -> None:
    local = ["generate", QUESTION, "-b", "hf", "-m", tiny_target, "-a", tiny_artifact]
    for flag in ("--device", "--target-device"):
        assert "abacus" in refused(*local, flag, "abacus", code=2)


@pytest.mark.parametrize("what", ["prompts", "forget", "recipe"])
def test_a_file_that_is_not_utf_8(what: str, tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / f"{what}.{'yaml' if what == 'recipe' else 'jsonl'}"
    file.write_bytes(b'{"question": "Who?", "answer": "He."}\n{"question": "caf\xe9"}\n')
    if what == "prompts":
        told = refused("generate", "--input", file, "-b", "hf", "-m", tiny_target, code=1)
    elif what == "forget":
        told = refused("train", "--base", tiny_target, "--forget", file, "--retain", tiny_data[1], "-o", tmp_path / "out", code=1)
    else:
        told = refused("train", "--recipe", file, code=2)
    assert "not UTF-8" in told
    assert (f"{file.name}:2" in told) or what == "recipe"


def test_a_recipe_with_an_unknown_setting(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 0.1\n", encoding="utf-8")
    assert "did you mean 'learning_rate'" in refused("train", "--recipe", recipe, code=2)


def test_debug_shows_the_traceback() -> None:
    from uld_sdk import UnknownName

    outcome = CliRunner().invoke(app, ["--debug", "generate", "hi", "-b", "tgj"])
    assert isinstance(outcome.exception, UnknownName)
