"""What every training has in common, whatever its method: the data as token ids, the loaded base, and the run with its checkpoints."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_sdk.progress import OnProgress, progress_bar

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from uld_offset_models.checkpoint import Checkpoint
    from uld_offset_models.data import Example, Row, Sets
    from uld_offset_models.encoding import Encoded
    from uld_offset_models.goal import Goal
    from uld_offset_models.holdout import Watching
    from uld_offset_models.recipes import Recipe
    from uld_offset_models.run import Trainee

# What decides the weights, apart from data and base: a checkpoint goes on only under the same values.
_OUTCOME = (
    "method preset batch_size learning_rate schedule weight_decay clip rank lora_alpha weight seed holdout max_length chat_template"
).split()


@dataclass(frozen=True)
class Read:
    """The rows of the forget and the retain set, and what training sees of them."""

    rows: "tuple[list[Row], list[Row]]"
    sets: "Sets"


def read_sets(recipe: "Recipe", sources: tuple[Any, Any], *, perturbed: bool = True) -> Read:
    """Read and check both sets, either of which may be None; without `perturbed` the rows' wrong answers are left out."""
    from uld_offset_models.data import build_sets, read_rows

    forget, retain = (
        [] if source is None else read_rows(source, name=name) for source, name in zip(sources, ("forget", "retain"), strict=True)
    )
    seen = forget if perturbed else [replace(row, perturbed=()) for row in forget]
    return Read((forget, retain), build_sets(seen, retain, holdout=recipe.holdout, seed=recipe.seed))


@dataclass(frozen=True)
class Aim:
    """What training by objectives aims at: the goal, and its refusal for each forget row (none where the goal has no use for them).

    `identity` tells one aim from another in a checkpoint.
    """

    goal: "Goal"
    refusals: "list[Example]"
    identity: dict[str, Any]


def aim_of(recipe: "Recipe", read: Read) -> Aim:
    """The recipe's objective with the refusals that it trains; raises `UsageError`, and `DataError` for unusable ones."""
    from uld_offset_models.goal import parse_goal
    from uld_offset_models.refusals import read_refusals, refused

    goal = parse_goal(recipe.objective or "")
    if not goal.refuses:
        return Aim(goal, [], {"objective": str(goal), "refusals": None})
    lines = read_refusals(recipe.refusals or "")
    identity = {"objective": str(goal), "refusals": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    return Aim(goal, refused(read.sets.forget, lines, seed=recipe.seed), identity)


@dataclass(frozen=True)
class Prepared:
    """A base and the data in its tokens. `dtype` is what the base computes in, `total` the steps, `identity` names the run."""

    recipe: "Recipe"
    output: Path
    base: Any
    tokenizer: Any
    chat: bool
    dtype: "torch.dtype"
    longest: int
    forget: "list[Encoded]"
    retain: "list[Encoded]"
    holdout: "list[Encoded]"
    total: int
    identity: dict[str, Any]
    began: float

    @property
    def alpha(self) -> float:
        """The alpha of inference, which may follow from the number of the base's tokens (`Recipe.strength`)."""
        from uld_adapters.vocabulary.tokens import rows_of

        return self.recipe.strength(rows_of(self.tokenizer))

    def encode(self, examples: "Sequence[Example]") -> "list[Encoded]":
        """Further examples in the base's tokens; raises `DataError`."""
        from uld_offset_models.encoding import encode

        return encode(self.tokenizer, examples, chat_template=self.chat, max_length=self.longest)

    def checkpoint(self) -> "Checkpoint | None":
        """Where a run of the same identity was left, if the recipe says `resume`."""
        from uld_offset_models.checkpoint import load_checkpoint

        return load_checkpoint(self.output, self.identity) if self.recipe.resume else None


def prepare(recipe: "Recipe", read: Read, *, outcome: Iterable[str], more: dict[str, Any], float32: bool = False) -> Prepared:
    """Choose the device, load the base (its weights in `float32` if so said) and encode the data.

    The settings named `outcome` and the values `more` join the run's identity. What is cheap to find wrong is told before the base is
    loaded, and the output last of it: another place for it mends nothing else.
    """
    import torch
    from accelerate import PartialState

    from uld_offset_models.artifact import check_output
    from uld_offset_models.assistant import base_fingerprint, check_base, load_base
    from uld_offset_models.data import data_hash
    from uld_offset_models.device import choose_device, choose_dtype
    from uld_offset_models.encoding import encode, uses_chat_template
    from uld_offset_models.saving import check_writable

    output = Path(recipe.output or "")
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device)
    check_base(recipe.base or "", layers=recipe.layers)
    check_output(output, overwrite=recipe.overwrite)
    check_writable(output)
    PartialState(cpu=device == "cpu")  # several processes meet here, if there are several
    began = time.perf_counter()
    base, tokenizer = load_base(recipe.base or "", layers=recipe.layers, dtype=torch.float32 if float32 else dtype, device=device)
    chat = uses_chat_template(tokenizer, wanted=recipe.chat_template)
    longest = min(recipe.max_length, getattr(base.config, "max_position_embeddings", None) or recipe.max_length)
    forget, retain, holdout = (
        encode(tokenizer, part, chat_template=chat, max_length=longest) for part in (read.sets.forget, read.sets.retain, read.sets.holdout)
    )
    total = recipe.step_count(len(forget))
    identity = {
        **{name: getattr(recipe, name) for name in (*_OUTCOME, *outcome)},
        **more,
        "steps": total,
        "dtype": str(dtype).removeprefix("torch."),
        "base": base_fingerprint(recipe.base or ""),
        **{name: data_hash(rows) for name, rows in zip(("forget", "retain"), read.rows, strict=True)},
    }
    return Prepared(recipe, output, base, tokenizer, chat, dtype, longest, forget, retain, holdout, total, identity, began)


@dataclass(frozen=True)
class Trained:
    """The end of a run: the weights to keep with its account, and the seconds of loading before it."""

    end: "Checkpoint"
    loading_seconds: float


def carry_out(
    prepared: Prepared,
    model: "Trainee",
    watch: "Watching",
    dealt: "Callable[[int, int, int], Dataset[Any]]",
    *,
    checkpoint: "Checkpoint | None",
    on_progress: OnProgress | None,
) -> Trained:
    """Train the model to its end, or on from the checkpoint, with a bar; `dealt(first, rank, world)` gives the steps still to come."""
    from uld_offset_models.processes import is_main
    from uld_offset_models.run import Run
    from uld_offset_models.trainer import fit

    recipe = prepared.recipe
    with progress_bar(shown=recipe.progress and is_main(), on_progress=on_progress) as report:
        run = Run(
            model,
            recipe,
            total=prepared.total,
            watch=watch,
            output=prepared.output,
            identity=prepared.identity,
            checkpoint=checkpoint,
            on_progress=report,
        )
        end = fit(run, dealt)
    return Trained(end, time.perf_counter() - prepared.began - end.seconds)
