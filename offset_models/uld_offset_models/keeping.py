"""Keeping what was trained: in its folder or, where that cannot be written, as a checkpoint that needs no more training."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from uld_adapters.errors import SaveFailed, TrainingError
from uld_offset_models.checkpoint import Checkpoint, checkpoint_folder, drop_checkpoint, save_checkpoint

Saved = TypeVar("Saved")


def keep(output: Path, save: Callable[[], Saved], *, trained: Checkpoint) -> Saved:
    """Save to `output` and delete the run's checkpoint, which remembers the forget set, too.

    Where the folder cannot be written, or Ctrl-C breaks that off, the trained weights are kept as a checkpoint: beside the
    output or, if there is no room, in the system's temporary folder. Raises `SaveFailed` or `TrainingError` saying where.
    """
    try:
        saved = save()
    except SaveFailed as error:
        where, hint = _rescue(output, trained)
        raise SaveFailed(f"{error.message}; {where}", hint=hint) from error
    except KeyboardInterrupt as interrupt:
        where, hint = _rescue(output, trained)
        stopped = TrainingError(f"interrupted while {output} was written; {where}", hint=hint)
        stopped.exit_code = 130
        raise stopped from interrupt
    drop_checkpoint(output)
    return saved


_SECRET = "delete it when done: it remembers the forget set"


def _rescue(output: Path, trained: Checkpoint) -> tuple[str, str]:
    """Where the trained weights are now, and how to go on from there."""
    earlier = checkpoint_folder(output).exists()
    try:
        folder = save_checkpoint(output, trained)
        return (
            f"the trained weights are kept at {folder}; {_SECRET}",
            "free some space and run the same command with --resume: it finishes at once",
        )
    except SaveFailed:
        room = Path(tempfile.mkdtemp(prefix="uld-"))
    try:
        folder = save_checkpoint(room / output.name, trained)
        return (
            f"the trained weights are kept at {folder}; {_SECRET}",
            f"run the same command with --resume -o {room / output.name}: it finishes at once",
        )
    except SaveFailed:
        shutil.rmtree(room, ignore_errors=True)
    if earlier:
        return (
            f"an earlier checkpoint is left at {checkpoint_folder(output)}; {_SECRET}",
            "free some space and run the same command with --resume to go on from it",
        )
    return "nor was there room for the trained weights anywhere else", "free some space or choose another -o/--output, and train again"
