"""Checkpoints: weights, optimiser moments, random state and the position in the data, as safetensors and JSON (no pickle)."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uld_adapters.errors import UsageError
from uld_offset_models.saving import saving

_TENSORS, _STATE = "state.safetensors", "state.json"
_PARTS = ("weights", "moments", "kept")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after `step` steps; data order is a function of seed and step, so the step is the position in the data.

    `kept` are the weights of the last good check of the hold-out, `kept_at` its shares, `last` those of the last check. `run`
    identifies the settings and data of the run. A finished one holds the weights to save and needs no moments.
    """

    step: int
    run: dict[str, Any]
    seconds: float
    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    random: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_at: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    finished: bool = False


def checkpoint_folder(output: Path) -> Path:
    """The checkpoint's place: beside the artifact, removed when that is complete."""
    return output.with_name(f"{output.name}.checkpoint")


def save_checkpoint(output: Path, checkpoint: Checkpoint) -> Path:
    """Replace the checkpoint of the run whose artifact goes to `output`, as a whole; raises `SaveFailed`."""
    from safetensors.torch import save_file

    folder = checkpoint_folder(output)
    tensors = {"random": checkpoint.random}
    for part in _PARTS:
        tensors.update({f"{part}.{name}": value.detach().cpu().contiguous() for name, value in getattr(checkpoint, part).items()})
    state = {name: getattr(checkpoint, name) for name in ("step", "run", "seconds", "history", "kept_at", "last", "finished")}
    with saving(folder) as part_folder:
        save_file(tensors, str(part_folder / _TENSORS))
        (part_folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
    return folder


def load_checkpoint(output: Path, run: dict[str, Any]) -> Checkpoint:
    """Read the run's checkpoint; raises `UsageError` when there is none or it belongs to other settings or data."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = checkpoint_folder(output)
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / _TENSORS))
        parts = {part: {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")} for part in _PARTS}
        checkpoint = Checkpoint(**{**state, **parts}, random=tensors["random"])
    except FileNotFoundError as error:
        raise UsageError(f"there is no checkpoint at {folder} to resume from", hint="leave out --resume to start anew") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(f"the checkpoint at {folder} cannot be read: {error}", hint="delete it and start anew without --resume") from error
    saved = checkpoint.run
    if changed := sorted(name for name in run.keys() | saved.keys() if run.get(name) != saved.get(name)):
        shown = ", ".join(f"{name} was {saved.get(name)!r}, now {run.get(name)!r}" for name in changed[:3])
        raise UsageError(
            f"the checkpoint at {folder} belongs to another run: {shown}", hint="repeat the first run's settings, or leave out --resume"
        )
    return checkpoint


def drop_checkpoint(output: Path) -> None:
    """Delete the checkpoint: it, too, remembers the forget set."""
    shutil.rmtree(checkpoint_folder(output), ignore_errors=True)


def moments_of(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's moments and step counts, by parameter name."""
    return {
        f"{key}.{name}": optimizer.state[p][key].clone()
        for name, p in parameters.items()
        for key in _MOMENTS
        if key in optimizer.state.get(p, {})
    }


def restore_moments(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], moments: dict[str, Tensor]) -> None:
    """Put the moments back, each on its parameter's device."""
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            key: moments[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device) for key in _MOMENTS if f"{key}.{name}" in moments
        }


def weights_of(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the trained weights."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def restore_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Copy saved weights into the parameters."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
