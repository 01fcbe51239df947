"""One training run: how far it is, what it writes down after each step, and when it ends."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from uld_adapters.errors import TrainingError
from uld_offset_models.checkpoint import (
    Checkpoint,
    moments_of,
    restore_moments,
    restore_weights,
    save_checkpoint,
    weights_of,
)
from uld_offset_models.holdout import Watching
from uld_offset_models.processes import anywhere, from_main
from uld_offset_models.recipes import Recipe

OnProgress = Callable[[dict[str, float]], None]


class Trainee(Protocol):
    """What can be trained: an assistant, a pair, or a white box."""

    @property
    def head(self) -> torch.Tensor:
        """The output embedding, which tells the device."""

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training moves, by name."""


def _groups(assistant: Trainee, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters with the rate at which they move: a gate may have one of its own."""
    parts: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])
    for name, parameter in assistant.trained().items():
        parts[name.startswith("gate.")].append(parameter)
    rates = (recipe.learning_rate, recipe.gate_rate or recipe.learning_rate)
    return [{"params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True) if part]


class Run:
    """A run from step `first` to `total`. With several processes rank 0 measures, decides and writes for all of them.

    `identity` names the run in its checkpoints. `interrupted` is set by Ctrl-C and seen at the end of the step.
    """

    def __init__(
        self,
        assistant: Trainee,
        recipe: Recipe,
        *,
        total: int,
        watch: Watching,
        output: Path,
        identity: dict[str, Any],
        checkpoint: Checkpoint | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.assistant, self.recipe, self.total, self.watch = assistant, recipe, total, watch
        self.output, self.identity, self.on_progress = output, identity, on_progress
        self.first = self.done = 0
        self.history: list[dict[str, float]] = []
        self.spent = 0.0
        self.began: float | None = None
        self.interrupted = self.finished = False
        self.random: torch.Tensor | None = None
        self.check_every = watch.every(total)
        self.save_every = recipe.checkpoint_every or max(1, total // 4)
        self.optimizer = torch.optim.AdamW(_groups(assistant, recipe), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.first = self.done = checkpoint.step
        self.history, self.spent, self.random = checkpoint.history, checkpoint.seconds, checkpoint.random
        self.watch.kept, self.watch.kept_at, self.watch.last = checkpoint.kept, checkpoint.kept_at, checkpoint.last
        self.finished = checkpoint.finished
        restore_weights(self.assistant.trained(), checkpoint.weights)
        restore_moments(self.optimizer, self.assistant.trained(), checkpoint.moments)

    @property
    def steps_left(self) -> int:
        """Steps that are still to be trained."""
        return 0 if self.finished else max(0, self.total - self.first)

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.spent + (0.0 if self.began is None else time.perf_counter() - self.began)

    def begin(self) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def after_step(self, steps_here: int, losses: dict[str, float]) -> bool:
        """Write the step down; true when the run ends here. Raises `TrainingError` after a checkpoint when interrupted before that."""
        self.done = self.first + steps_here
        entry, stop = from_main(lambda: self._look(losses))
        self.history.append(entry)
        interrupted = anywhere(self.interrupted)
        if stop or self.done == self.total:  # a Ctrl-C in the last step has nothing left to break off
            return stop
        if interrupted:
            error = TrainingError(
                f"interrupted after {self.done} of {self.total} steps; the checkpoint is kept at {self._save()}",
                hint="run the same command with --resume to go on (resume=True in Python)",
            )
            error.exit_code = 130
            raise error
        if self.done % self.save_every == 0:
            self._save()
        return stop

    def _look(self, losses: dict[str, float]) -> tuple[dict[str, float], bool]:
        """The step's entry of the history, and whether time or the hold-out ends the run."""
        entry = {"step": float(self.done), **losses}
        pace = self.seconds / self.done
        time_up = self.recipe.max_seconds is not None and self.seconds + pace > self.recipe.max_seconds
        if self.done % self.check_every == 0 or self.done == self.total or time_up:
            entry.update(self.watch.check(self.assistant, self.done))
        stop = time_up or self.watch.should_stop()
        entry["seconds"] = self.seconds
        if self.on_progress is not None:
            self.on_progress({**entry, "steps": float(self.total), "left": 0.0 if stop else pace * (self.total - self.done)})
        return entry, stop

    def _save(self) -> Path:
        trained = self.assistant.trained()
        watch = self.watch
        return from_main(
            lambda: save_checkpoint(
                self.output,
                Checkpoint(
                    step=self.done,
                    run=self.identity,
                    seconds=self.seconds,
                    history=self.history,
                    weights=weights_of(trained),
                    moments=moments_of(self.optimizer, trained),
                    random=torch.get_rng_state(),
                    kept=watch.kept,
                    kept_at=watch.kept_at,
                    last=watch.last,
                ),
            )
        )

    def finish(self) -> Checkpoint:
        """Settle which weights are kept, and return them with the run's account: a checkpoint with nothing left to train."""
        shares = from_main(lambda: self.watch.settle(self.assistant))
        return Checkpoint(
            step=int(shares.get("step", self.done)),
            run=self.identity,
            seconds=self.seconds,
            history=self.history,
            weights=weights_of(self.assistant.trained()),
            moments={},
            random=torch.get_rng_state(),
            last=shares,
            finished=True,
        )
