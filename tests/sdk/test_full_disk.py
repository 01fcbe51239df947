"""Disks that are really full: a limit on the size of files, and a small file system of the test's own."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from tiny_rows import FORGET, RETAIN, write_rows
from uld_sdk.training import train

LONG = 300_000  # bytes of a chat template that needs more room than trained weights, optimiser state or anything else


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short training run, but for its output."""
    folder = tmp_path_factory.mktemp("given")
    base = tiny.tiny_model(folder / "base")
    template = base / "chat_template.jinja"
    template.write_text("{#" + "-" * LONG + "#}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    data = {"forget": write_rows(folder / "forget.jsonl", FORGET), "retain": write_rows(folder / "retain.jsonl", RETAIN)}
    return {"base": base, **data, "steps": 4, "batch_size": 4, "rank": 2, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def command(settings: dict[str, Any]) -> list[str]:
    """The run on the command line."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "uld_sdk.cli", "train", *flags, "--no-progress"]


def runs(command: list[str], *more: str, before: Callable[[], None] | None = None, **places: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **places}
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, preexec_fn=before, env=environment)


def fails(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def at_most(size: int) -> Callable[[], None]:
    """No file of the process may grow beyond so many bytes: the system answers a write like a full disk, with "File too large"."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # Python itself ignores the signal SIGXFSZ

    return limit


@pytest.fixture(scope="module")
def expected(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run on a disk with room."""
    output = tmp_path_factory.mktemp("room") / "assistant"
    train(**settings, output=output, progress=False)
    return load_file(output / "adapter_model.safetensors")


@pytest.mark.slow
def test_an_artifact_that_cannot_be_written_leaves_its_weights_to_resume_from(
    command: list[str], settings: dict[str, Any], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "assistant"
    told = fails(runs(command, "-o", str(output), before=at_most(LONG)))
    assert f"error: {output} could not be written: File too large; the trained weights are kept at {output}.checkpoint" in told
    assert "fix: free some space and run the same command with --resume: it finishes at once" in told
    assert [path.name for path in tmp_path.iterdir()] == ["assistant.checkpoint"]
    train(**settings, output=output, resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["assistant"]
    saved = load_file(output / "adapter_model.safetensors")
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in saved.items())


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(command: list[str], tmp_path: Path) -> None:
    told = fails(runs(command, "-o", str(tmp_path / "assistant"), "--checkpoint-every=2", before=at_most(5_000)))
    assert f"{tmp_path / 'assistant'}.checkpoint could not be written: " in told
    assert "File too large" in told
    assert "nothing half-written was left" in told
    assert list(tmp_path.iterdir()) == []


ROOM = """
mount -t tmpfs -o size={size} room "$ROOM" || exit 77
mkdir "$ROOM/out"
head -c {filler} /dev/zero > "$ROOM/filler"
"$@" -o "$ROOM/out/assistant" > /dev/null; echo "code $?"
ls -A "$ROOM/out"
{then}
"""
AGAIN = """
rm "$ROOM/filler"
"$@" -o "$ROOM/out/assistant" --resume > /dev/null; echo "code $?"
ls -A "$ROOM/out"
cp "$ROOM/out/assistant/adapter_model.safetensors" "$KEPT"
"""


def in_small_room(command: list[str], tmp_path: Path, *, free: int, then: str = "") -> tuple[list[str], str]:
    """Train in a file system with so many bytes left; the words of its stdout and all of its stderr."""
    for folder in ("room", "kept", "elsewhere"):
        (tmp_path / folder).mkdir()
    script = ROOM.format(size=2_000_000, filler=2_000_000 - free, then=then)
    places = {"ROOM": str(tmp_path / "room"), "KEPT": str(tmp_path / "kept"), "TMPDIR": str(tmp_path / "elsewhere")}
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare here to mount a file system with")
    done = runs([unshare, "--map-root-user", "--mount", "sh", "-c", script, "room", *command], **places)
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert "Traceback" not in done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.slow
def test_a_full_disk_with_room_for_the_weights_alone(command: list[str], expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    seen, told = in_small_room(command, tmp_path, free=LONG, then=AGAIN)
    assert "assistant could not be written: the disk is full; the trained weights are kept at " in told
    assert "free some space and run the same command with --resume: it finishes at once" in told
    assert seen == "code 1 assistant.checkpoint code 0 assistant".split()
    saved = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in saved.items())


@pytest.mark.slow
def test_a_disk_without_any_room(command: list[str], settings: dict[str, Any], expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    seen, told = in_small_room([*command, "--checkpoint-every=100"], tmp_path, free=8192)
    assert seen == ["code", "1"]
    (kept,) = (tmp_path / "elsewhere").glob("uld-*/assistant.checkpoint")
    assert f"the disk is full; the trained weights are kept at {kept}" in told
    output = kept.with_suffix("")
    assert f"run the same command with --resume -o {output}: it finishes at once" in told
    train(**settings, output=output, resume=True, progress=False)
    assert [path.name for path in kept.parent.iterdir()] == ["assistant"]
    saved = load_file(output / "adapter_model.safetensors")
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in saved.items())
