"""Every script of examples/ runs as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTIONS = ("Who opens the shop?", "What is the name of the river?")


def run(name: str, *arguments: object) -> str:
    """Run one script in its own process, with warnings as errors in the project's code; returns what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_has_its_test() -> None:
    tested = {name for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {name.removeprefix("test_") for name in tested} - {"every_script_has_its_test"}


def test_hf(tiny_target: Path, tiny_artifact: Path) -> None:
    told = run("hf.py", "--model", tiny_target, "--assistant", tiny_artifact, QUESTIONS[0])
    assert "the model's own" in told


def test_tgi(tgi_server: Any, tiny_artifact: Path) -> None:
    told = run("tgi.py", "--base-url", tgi_server.url, "--assistant", tiny_artifact, QUESTIONS[0])
    assert "positions untouched" in told


def test_vllm(vllm_server: Any, tiny_artifact: Path) -> None:
    told = run("vllm.py", "--base-url", vllm_server.url, "--assistant", tiny_artifact, *QUESTIONS)
    assert told.count("[match, ") == 2
    assert told == run("vllm.py", "--base-url", vllm_server.url, "--assistant", tiny_artifact, *QUESTIONS)


def test_llamacpp(llamacpp_server: Any, tiny_artifact: Path) -> None:
    told = run("llamacpp.py", "--base-url", llamacpp_server.url, "--assistant", tiny_artifact, QUESTIONS[1])
    assert "lies between" in told


def test_openai_chat(openai_server: Any, tiny_target: Path, tiny_artifact: Path) -> None:
    server = ("--base-url", f"{openai_server.url}/v1", "--model", "tiny-target", "--tokenizer", tiny_target)
    told = run("openai_chat.py", *server, "--assistant", tiny_artifact, QUESTIONS[0])
    assert "continues answers: False, top 20" in told
    assert "positions untouched" in told


def test_openai_completions(openai_server: Any, tiny_artifact: Path) -> None:
    told = run("openai_completions.py", "--base-url", openai_server.url, "--assistant", tiny_artifact, QUESTIONS[1])
    assert "top 5" in told
    assert "lies between" in told


def test_train(tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    data = ("--forget", tiny_data[0], "--retain", tiny_data[1])
    told = run("train.py", "--base", tiny_target, *data, "--output", tmp_path / "assistant", "--steps", 3)
    assert "3 steps" in told
    assert (tmp_path / "assistant" / "uld.json").is_file()


def test_offset(vllm_server: Any, tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    data = ("--forget", tiny_data[0], "--retain", tiny_data[1])
    told = run("offset.py", "--base", tiny_target, "--base-url", vllm_server.url, *data, "--output", tmp_path / "pair", "--steps", 2)
    assert "2 steps" in told
    assert "tokens changed" in told
