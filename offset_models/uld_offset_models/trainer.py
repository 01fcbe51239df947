"""ULD training on transformers.Trainer: packed rows, remember + weight * uniform, checkpoints, the hold-out, and a clean stop."""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from uld_adapters.errors import TrainingDiverged, TrainingError
from uld_offset_models.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    moments_of,
    restore_moments,
    restore_weights,
    save_checkpoint,
    weights_of,
)
from uld_offset_models.holdout import Watch
from uld_offset_models.network import Assistant, Losses
from uld_offset_models.packing import Pack
from uld_offset_models.recipes import Recipe
from uld_offset_models.schedule import multiplier
from uld_offset_models.steps import Steps

_CHECKS = 5  # looks at the hold-out in one run

OnProgress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Fit:
    """What a run left: the number of steps done, seconds of training, and one entry of losses (nats) for each step."""

    steps: int
    seconds: float
    history: list[dict[str, float]]


class UldTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is remember + weight * uniform on one pack a step; rows are dealt by `Steps`, not by accelerate."""

    def __init__(self, *, weight: float, **options: Any) -> None:
        super().__init__(data_collator=lambda items: {"step": items[0]}, **options)
        self.weight = weight
        self.losses: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader[Pack]:
        """One item is one step, in order; each process packs its own rows."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=self.data_collator)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean NLL of the forget answers + weight * mean KL(U || p_a) of the retain answers; raises `TrainingDiverged` if not finite."""
        losses: Losses = model(inputs["step"])
        loss = losses.remember + self.weight * losses.uniform
        self.losses = {"remember": losses.remember.item(), "uniform": losses.uniform.item(), "loss": loss.item()}
        if not torch.isfinite(loss):
            parts = ", ".join(f"{name} {value}" for name, value in self.losses.items())
            raise TrainingDiverged(
                f"the loss is not finite at step {self.state.global_step + 1} ({parts})",
                hint="lower --learning-rate, or train in --dtype float32",
            )
        loss = loss * self.args.world_size  # processes average their gradients; these are shares of one mean
        return (loss, losses) if return_outputs else loss


class _Conductor(TrainerCallback):  # type: ignore[misc]
    """After each step: history, progress, hold-out, checkpoints, and the reasons to stop."""

    def __init__(self, run: "_Run") -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self.run.random is not None:
            torch.set_rng_state(self.run.random)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
        if self.run.after_step(state.global_step):
            control.should_training_stop = True
        return control


class _Run:
    """One run from `first` to `total` steps, and what it has to write down."""

    def __init__(
        self,
        assistant: Assistant,
        recipe: Recipe,
        total: int,
        watch: Watch,
        output: Path,
        identity: dict[str, Any],
        on_progress: OnProgress | None,
    ) -> None:
        self.assistant, self.recipe, self.total, self.watch = assistant, recipe, total, watch
        self.output, self.identity, self.on_progress = output, identity, on_progress
        self.first, self.done = 0, 0
        self.history: list[dict[str, float]] = []
        self.spent, self.began = 0.0, time.perf_counter()
        self.interrupted = False
        self.trainer: UldTrainer | None = None
        self.random: torch.Tensor | None = None
        self.check_every = max(1, total // _CHECKS)
        self.save_every = recipe.checkpoint_every or max(1, total // 4)
        self.optimizer = torch.optim.AdamW(assistant.trained().values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.began

    def resume(self, checkpoint: Checkpoint) -> None:
        self.first = self.done = checkpoint.step
        self.history, self.spent = checkpoint.history, checkpoint.seconds
        self.watch.best, self.watch.best_at = checkpoint.best, checkpoint.best_at
        restore_weights(self.assistant.trained(), checkpoint.weights)
        restore_moments(self.optimizer, self.assistant.trained(), checkpoint.moments)
        self.random = checkpoint.random

    def after_step(self, steps_here: int) -> bool:
        """Write the step down; true when the run should end."""
        self.done = self.first + steps_here
        entry = {"step": float(self.done), **(self.trainer.losses if self.trainer else {})}
        last = self.done == self.total
        pace = self.seconds / self.done
        time_up = self.recipe.max_seconds is not None and self.seconds + pace > self.recipe.max_seconds
        if self.done % self.check_every == 0 or last or time_up:
            entry.update(self.watch.check(self.assistant, self.done))
        stop = time_up or self.watch.should_stop()
        entry["seconds"] = self.seconds
        self.history.append(entry)
        if self.on_progress is not None:
            self.on_progress({**entry, "steps": float(self.total), "left": 0.0 if stop else pace * (self.total - self.done)})
        if self.interrupted:
            folder = self.save()
            error = TrainingError(
                f"interrupted after {self.done} of {self.total} steps; the checkpoint is kept at {folder}",
                hint="run the same command with --resume to go on (resume=True in Python)",
            )
            error.exit_code = 130
            raise error
        if not last and not stop and self.done % self.save_every == 0:
            self.save()
        return stop

    def save(self) -> Path:
        trained = self.assistant.trained()
        if self.trainer is not None and not self.trainer.is_world_process_zero():
            return checkpoint_folder(self.output)
        return save_checkpoint(
            self.output,
            Checkpoint(
                step=self.done,
                run=self.identity,
                seconds=self.seconds,
                history=self.history,
                weights=weights_of(trained),
                moments=moments_of(self.optimizer, trained),
                random=torch.get_rng_state(),
                best=self.watch.best,
                best_at=self.watch.best_at,
            ),
        )


def fit(
    assistant: Assistant,
    dealt: Callable[[int, int, int], Steps],
    *,
    recipe: Recipe,
    total: int,
    watch: Watch,
    output: Path,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    on_progress: OnProgress | None = None,
) -> Fit:
    """Train in place. `dealt(first, rank, world)` gives the steps still to come; `identity` names the run in its checkpoints.

    Raises `TrainingDiverged`, `SaveFailed`, and `TrainingError` when interrupted (Ctrl-C), after a checkpoint was written.
    """
    run = _Run(assistant, recipe, total, watch, output, identity, on_progress)
    if checkpoint is not None:
        run.resume(checkpoint)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: multiplier(recipe.schedule, run.first + step, total))
    with tempfile.TemporaryDirectory() as scratch, _ctrl_c(run):
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=total - run.first,
            per_device_train_batch_size=1,
            max_grad_norm=recipe.clip,
            seed=recipe.seed,
            use_cpu=assistant.head.device.type == "cpu",
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        steps = dealt(run.first, arguments.process_index, arguments.world_size)
        trainer = run.trainer = UldTrainer(
            weight=recipe.weight,
            model=assistant,
            args=arguments,
            train_dataset=steps,
            optimizers=(run.optimizer, schedule),
            callbacks=[_Conductor(run)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        run.began = time.perf_counter()
        trainer.train()
    watch.settle(assistant)
    return Fit(run.done, run.seconds, run.history)


@contextmanager
def _ctrl_c(run: _Run) -> Iterator[None]:
    """The first Ctrl-C lets the step end and a checkpoint be written; a second one breaks off at once."""

    def handle(number: int, frame: Any) -> None:
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
