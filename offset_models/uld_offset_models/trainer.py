"""Training on transformers.Trainer: packed rows, forget loss + weight * retain loss, and a clean stop."""

import math
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from uld_adapters.errors import TrainingDiverged
from uld_offset_models.checkpoint import Checkpoint
from uld_offset_models.processes import summed
from uld_offset_models.run import Run
from uld_offset_models.schedule import multiplier


class UldTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is first + weight * second of the two that the model gives; rows are dealt by `Steps`, not by accelerate.

    The model gives a named tuple: remember and uniform of an assistant, forget and retain of a pair or a white box. `losses` are
    the step's means over all processes, by those names, in nats.
    """

    def __init__(self, *, weight: float, **options: Any) -> None:
        super().__init__(data_collator=lambda items: {"step": items[0]}, **options)
        self.weight = weight
        self.losses: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item is one step, in order; each process packs its own rows."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=self.data_collator)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss on the forget rows + weight * the loss on the retain rows; raises `TrainingDiverged` if not finite."""
        losses: tuple[Tensor, Tensor] = model(inputs["step"])
        names: tuple[str, str] = losses._fields  # type: ignore[attr-defined]
        first, second = summed(torch.stack(losses).detach()).tolist()
        self.losses = {names[0]: first, names[1]: second, "loss": first + self.weight * second}
        if not math.isfinite(self.losses["loss"]):  # the sum is, in every process alike, so that all of them end here
            parts = ", ".join(f"{name} {value}" for name, value in self.losses.items())
            raise TrainingDiverged(
                f"the loss is not finite at step {self.state.global_step + 1} ({parts})",
                hint="lower --learning-rate, or train in --dtype float32",
            )
        # Processes average their gradients; these are shares of one mean.
        loss = (losses[0] + self.weight * losses[1]) * self.args.world_size
        return (loss, losses) if return_outputs else loss


class _Conductor(TrainerCallback):  # type: ignore[misc]
    """Tells the run of each step, and the trainer when the run ends."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trainer: UldTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self.run.random is not None:
            torch.set_rng_state(self.run.random)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
        if self.run.after_step(state.global_step, self.trainer.losses if self.trainer else {}):
            control.should_training_stop = True
        return control


def fit(run: Run, dealt: Callable[[int, int, int], Dataset[Any]]) -> Checkpoint:
    """Train the run's model in place to its end. `dealt(first, rank, world)` gives the steps still to come.

    Returns the weights to save, as a checkpoint with nothing left to train; of such a one it returns at once. Raises
    `TrainingDiverged`, `SaveFailed`, and `TrainingError` when interrupted (Ctrl-C), after a checkpoint was written.
    """
    if run.steps_left:
        with tempfile.TemporaryDirectory() as scratch, _ctrl_c(run):
            _train(run, dealt, scratch)
    return run.finish()


def _train(run: Run, dealt: Callable[[int, int, int], Dataset[Any]], scratch: str) -> None:
    recipe = run.recipe
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=run.steps_left,
        per_device_train_batch_size=1,
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        use_cpu=run.assistant.head.device.type == "cpu",
        ddp_broadcast_buffers=False,  # frozen, and as large as the vocabulary
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # further GPUs are processes of their own: torch's DataParallel cannot split a pack
    conductor = _Conductor(run)
    trainer = conductor.trainer = UldTrainer(
        weight=recipe.weight,
        model=run.assistant,
        args=arguments,
        train_dataset=dealt(run.first, arguments.process_index, arguments.world_size),
        optimizers=(
            run.optimizer,
            torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: multiplier(recipe.schedule, run.first + step, run.total)),
        ),
        callbacks=[conductor],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    run.begin()
    trainer.train()


@contextmanager
def _ctrl_c(run: Run) -> Iterator[None]:
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
