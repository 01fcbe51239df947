"""A folder that appears whole or not at all, readable by its owner only."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uld_adapters.errors import SaveFailed

_FULL = {errno.ENOSPC, errno.EDQUOT}
_ELSEWHERE = "free some space or choose another -o/--output; nothing half-written was left"


@contextmanager
def saving(output: Path) -> Iterator[Path]:
    """A private folder that takes the name `output` when the block ends well, and vanishes when it does not.

    Folder mode 0700, files 0600. Raises `SaveFailed`, which leaves `output` as it was.
    """
    folder = _part(output)
    try:
        _make(folder)
        yield folder
        for path in folder.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
            if path.is_file():
                _reach_disk(path)  # some disks say only now that they are full
        if output.exists():
            old = output.with_name(f".{output.name}.{os.getpid()}.old")
            output.rename(old)
            try:
                folder.rename(output)
            except OSError:
                old.rename(output)
                raise
            shutil.rmtree(old)
        else:
            folder.rename(output)
    except OSError as error:
        raise save_failed(output, error) from error
    except Exception as error:
        if "(os error " in str(error):  # safetensors and tokenizers wrap the system's error in classes of their own
            raise save_failed(output, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(output: Path, *, hint: str = _ELSEWHERE) -> None:
    """Make the folder that `output` will lie in and write a byte there, before work that would be lost; raises `SaveFailed`."""
    folder = _part(output)
    try:
        _make(folder)
        (folder / "room").write_bytes(b"\0")
    except OSError as error:
        raise save_failed(output, error, hint=hint) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _part(output: Path) -> Path:
    return output.with_name(f".{output.name}.{os.getpid()}.part")


def _make(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{folder.parent} is no folder") from error
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)


def _reach_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def save_failed(output: Path, error: Exception, *, hint: str = _ELSEWHERE) -> SaveFailed:
    """The error for what the system says of a write: full disks are named."""
    full = getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL)
    what = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    return SaveFailed(f"{output} could not be written: {what}", hint=hint)
