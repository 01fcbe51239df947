"""`--method direct`: the large model's own weights are tuned to forget, as the white-box baselines of the papers do."""

import hashlib
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import DataError
from uld_sdk.account import base_reference, installed_versions, mean_of_last
from uld_sdk.progress import OnProgress, progress_bar
from uld_sdk.training import TrainResult

if TYPE_CHECKING:
    from uld_offset_models.checkpoint import Checkpoint
    from uld_offset_models.data import Example
    from uld_offset_models.direct_folder import DirectManifest
    from uld_offset_models.encoding import Encoded
    from uld_offset_models.recipes import Recipe

# What decides the weights, apart from data and base: a checkpoint goes on only under the same values.
_OUTCOME = (
    "method preset beta trainable batch_size learning_rate schedule weight_decay clip rank lora_alpha weight seed holdout max_length "
    "chat_template"
).split()


def train_direct(recipe: "Recipe", sources: tuple[Any, Any], on_progress: OnProgress | None) -> TrainResult:
    """Tune the base towards the recipe's objective and save a peft adapter or a whole model; see `uld_sdk.train`.

    Paraphrases of the rows are trained like the rows, wrong answers are not: they are for assistants. Without a retain objective
    the retain set may be missing.
    """
    import torch
    from accelerate import PartialState

    from uld_offset_models.artifact import check_output
    from uld_offset_models.assistant import base_fingerprint, load_base
    from uld_offset_models.checkpoint import load_checkpoint
    from uld_offset_models.data import build_sets, data_hash, read_rows
    from uld_offset_models.device import choose_device, choose_dtype
    from uld_offset_models.direct_folder import save_direct
    from uld_offset_models.encoding import encode, uses_chat_template
    from uld_offset_models.goal import parse_goal
    from uld_offset_models.holdout import LikelihoodWatch
    from uld_offset_models.keeping import keep
    from uld_offset_models.lessons import Lessons, Reference
    from uld_offset_models.processes import from_main, is_main
    from uld_offset_models.refusals import read_refusals, refused
    from uld_offset_models.run import Run
    from uld_offset_models.steps import Steps
    from uld_offset_models.trainer import fit
    from uld_offset_models.white_box import build_white_box

    output = Path(recipe.output or "")
    check_output(output, overwrite=recipe.overwrite)
    goal = parse_goal(recipe.objective or "")
    rows = [[] if source is None else read_rows(source, name=name) for source, name in zip(sources, ("forget", "retain"), strict=True)]
    sets = build_sets([replace(row, perturbed=()) for row in rows[0]], rows[1], holdout=recipe.holdout, seed=recipe.seed)
    lines = read_refusals(recipe.refusals) if goal.refuses else ()
    examples = refused(sets.forget, lines, seed=recipe.seed) if goal.refuses else []

    device = choose_device(recipe.device)
    PartialState(cpu=device == "cpu")  # several processes meet here, if there are several
    dtype = choose_dtype(recipe.dtype, device)
    began = time.perf_counter()
    kept = torch.float32 if recipe.trainable == "full" else dtype  # a small step is lost in a bfloat16 weight
    base, tokenizer = load_base(recipe.base or "", dtype=kept, device=device)
    chat = uses_chat_template(tokenizer, wanted=recipe.chat_template)
    longest = min(recipe.max_length, getattr(base.config, "max_position_embeddings", None) or recipe.max_length)
    forget, retain, holdout, refusals = (
        encode(tokenizer, part, chat_template=chat, max_length=longest) for part in (sets.forget, sets.retain, sets.holdout, examples)
    )
    _check_answers(forget, sets.forget)
    total = recipe.step_count(len(forget))
    identity = {
        **{name: getattr(recipe, name) for name in _OUTCOME},
        "objective": str(goal),
        "refusals": hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None,
        "steps": total,
        "dtype": str(dtype).removeprefix("torch."),
        "base": base_fingerprint(recipe.base or ""),
        "forget": data_hash(rows[0]),
        "retain": data_hash(rows[1]),
    }
    checkpoint = load_checkpoint(output, identity) if recipe.resume else None
    model = build_white_box(
        base, tokenizer, goal=goal, beta=recipe.beta, trainable=recipe.trainable, rank=recipe.rank, lora_alpha=recipe.lora_alpha,
        seed=recipe.seed, bfloat16=dtype == torch.bfloat16,
    )  # fmt: skip
    answers = dict(zip(forget, refusals, strict=True)) if goal.refuses else {}
    trained_on = (forget, retain if goal.retain != "none" else [])

    def lessons(reference: Reference, first: int = 0, rank: int = 0, world: int = 1) -> Lessons:
        steps = Steps(*trained_on, batch=recipe.batch_size, seed=recipe.seed, first=first, last=total, rank=rank, world=world)
        return Lessons(steps, goal, answers, reference)

    done = checkpoint is not None and checkpoint.finished
    # Before the run, which may put a checkpoint's weights in place.
    reference = Reference() if done else model.reference(*lessons(Reference()).rows())

    with progress_bar(shown=recipe.progress and is_main(), on_progress=on_progress) as report:
        run = Run(
            model,
            recipe,
            total=total,
            watch=LikelihoodWatch(forget, holdout),
            output=output,
            identity=identity,
            checkpoint=checkpoint,
            on_progress=report,
        )
        trained = fit(run, lambda first, rank, world: lessons(reference, first, rank, world))
    loading = time.perf_counter() - began - trained.seconds

    def save() -> "DirectManifest":
        manifest = _manifest(recipe, trained, model, tokenizer, chat=chat, loading_seconds=loading)
        return save_direct(output, model=model, tokenizer=tokenizer, manifest=manifest, overwrite=recipe.overwrite)

    return TrainResult(output, from_main(lambda: keep(output, save, trained=trained)), trained.seconds, trained.history)


def _check_answers(rows: "list[Encoded]", examples: "tuple[Example, ...]") -> None:
    """An answer of which the tokenizer leaves nothing but the end token would teach the model to forget that answers end."""
    for row, example in zip(rows, examples, strict=True):
        if len(row.ids) - row.start < 2:
            raise DataError(f"{example.place}: the answer is empty for the base's tokenizer", hint="fill it or drop the row")


def _manifest(
    recipe: "Recipe", trained: "Checkpoint", model: Any, tokenizer: Any, *, chat: bool, loading_seconds: float
) -> "DirectManifest":
    from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
    from uld_offset_models.direct_folder import DirectManifest

    identity = trained.run
    settings = {k: v for k, v in identity.items() if k not in {"base", "forget", "retain", "objective", "method", "preset", "trainable"}}
    figures = {f"final_{name}": value for name, value in trained.last.items() if name != "step"}
    return DirectManifest(
        preset=recipe.preset,
        objective=identity["objective"],
        trainable=recipe.trainable,
        base=base_reference(recipe, identity["base"], layers=model.inner.config.num_hidden_layers),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        chat_template=chat,
        dtype=identity["dtype"],
        training={**settings, **figures, "loading_seconds": loading_seconds},
        data={name: identity[name] for name in ("forget", "retain")},
        versions=installed_versions(),
        training_seconds=round(trained.seconds, 3),
        losses=mean_of_last(trained, ("forget", "retain")),
        steps=trained.step,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in model.trained().values()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
