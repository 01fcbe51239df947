"""The README is run: its Python blocks in order, its data rows through the reader, its commands against their flags."""

import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_rows import FORGET, RETAIN, write_rows
from uld_sdk import train
from uld_sdk.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def newcomer(tmp_path: Path, tiny_target: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README speaks of."""
    (tmp_path / "small-model").symlink_to(tiny_target)
    shutil.copytree(tiny_artifact, tmp_path / "assistant")
    data = {"base": str(tiny_target), "forget": RETAIN[:2], "retain": FORGET, "output": tmp_path / "another-assistant"}
    train(**data, steps=1, device="cpu", progress=False)
    write_rows(tmp_path / "forget.jsonl", FORGET)
    write_rows(tmp_path / "retain.jsonl", RETAIN)
    write_rows(tmp_path / "forget_holdout.jsonl", [{"question": "What name does the river have?"}])
    write_rows(tmp_path / "retain_holdout.jsonl", [{"question": "Which animal jumps?"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_python_block_runs(newcomer: Path, tgi_server: Any, vllm_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks("python"), start=1):
        block = block.replace("http://localhost:8080", tgi_server.url).replace("http://localhost:8000", vllm_server.url)
        exec(compile(block, f"<README, Python block {number}>", "exec"), names)
    names["client"].close()
    assert (newcomer / "new-assistant" / "uld.json").is_file()
    told = capsys.readouterr().out
    assert "max_new_tokens can be at most" in told
    assert len(blocks("python")) >= 9


def test_the_data_rows_are_read(tmp_path: Path) -> None:
    from uld_offset_models.data import read_rows

    (block,) = blocks("json")
    file = tmp_path / "rows.jsonl"
    file.write_text(block, encoding="utf-8")
    assert len(read_rows(file)) == 3


def test_every_command_exists_with_its_flags() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("uld-sdk ")]
    assert {shlex.split(line)[1] for line in lines} == set(COMMANDS)
    for line in lines:
        _, command, *words = shlex.split(line)
        settings = [parameter.annotation.__metadata__[0] for parameter in inspect.signature(COMMANDS[command]).parameters.values()]
        said = [name for option in settings for name in (option.default, *(option.param_decls or ()))]  # typer keeps the first apart
        flags = {flag for name in said for flag in str(name).split("/")}
        assert {word for word in words if word.startswith("-")} <= flags, line


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    pages = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", pages, flags=re.MULTILINE)) <= targets
    assert {"demo", "test", "check", "bench", "test-vllm", "bench-gpu"} <= targets


def test_the_file_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
