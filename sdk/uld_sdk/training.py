"""From a base, a forget set and a retain set to a saved assistant or tuned model: `uld_sdk.train(...)`, which `uld-sdk train` calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import MissingExtra, UsageError
from uld_sdk.account import account
from uld_sdk.preparation import Prepared, Trained, carry_out, prepare, read_sets
from uld_sdk.progress import OnProgress
from uld_sdk.train_result import TrainResult

if TYPE_CHECKING:
    from uld_offset_models.manifest import Manifest
    from uld_offset_models.network import Assistant
    from uld_offset_models.recipes import Recipe

Data = str | Path | Sequence[Mapping[str, Any]]
_OUTCOME = ("layers", "gate", "gate_rate", "stop_untouched", "margin")  # with those that every method has: what decides the weights


def train(
    *,
    base: str | Path | None = None,
    forget: Data | None = None,
    retain: Data | None = None,
    output: str | Path | None = None,
    recipe: str | Path | None = None,
    method: str | None = None,
    preset: str | None = None,
    objective: str | None = None,
    beta: float | None = None,
    trainable: str | None = None,
    refusals: str | Path | None = None,
    cache: str | Path | None = None,
    target: str | Path | None = None,
    target_tokenizer: str | Path | None = None,
    start: str | Path | None = None,
    tail: str | None = None,
    virtual_tokens: int | None = None,
    layers: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    min_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    gate_rate: float | None = None,
    schedule: str | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    rank: int | None = None,
    lora_alpha: int | None = None,
    gate: bool | None = None,
    weight: float | None = None,
    alpha: float | None = None,
    trained_alpha: float | None = None,
    margin: float | None = None,
    filter: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    holdout: float | None = None,
    stop_untouched: float | None = None,
    resume: bool | None = None,
    checkpoint_every: int | None = None,
    max_length: int | None = None,
    max_seconds: float | None = None,
    chat_template: bool | None = None,
    overwrite: bool | None = None,
    progress: bool | None = None,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train an assistant that remembers `forget` and is uniform on `retain`, and save it to `output`.

    With method "direct" tune `base` itself towards an objective such as "npo+kl", and save a peft adapter or a whole model. With method
    "offset" train a pair that starts from `base`, so that its difference, added to the target, does that; what the target says of the
    rows comes from `cache` (in other tokens than the base's: with its `target_tokenizer`) or `target`. Settings come from the preset
    ("gated" unless said otherwise, else that of the method), then the recipe file, then the arguments. `forget` and `retain` are paths,
    hub names or lists of dicts; `max_seconds` bounds the training loop; `on_progress` is called after every step, of several processes
    in rank 0 alone. Raises `UsageError`, `DataError`, `TrainingDiverged`, `SaveFailed`, and `TrainingError` when interrupted.
    """
    from uld_offset_models.recipes import resolve

    settings = resolve(
        recipe=recipe, preset=preset, method=method, objective=objective, beta=beta, trainable=trainable,
        refusals=_text(refusals), cache=_text(cache), target=_text(target),
        target_tokenizer=_text(target_tokenizer), start=_text(start), tail=tail, virtual_tokens=virtual_tokens, layers=layers,
        steps=steps, epochs=epochs, min_steps=min_steps, batch_size=batch_size,
        learning_rate=learning_rate, gate_rate=gate_rate, schedule=schedule, weight_decay=weight_decay, clip=clip, rank=rank,
        lora_alpha=lora_alpha, gate=gate, trained_alpha=trained_alpha,
        weight=weight, alpha=alpha, margin=margin, filter=filter, seed=seed, device=device, dtype=dtype, holdout=holdout,
        stop_untouched=stop_untouched, resume=resume, checkpoint_every=checkpoint_every, max_length=max_length, max_seconds=max_seconds,
        chat_template=chat_template, overwrite=overwrite, progress=progress, base=_text(base), output=_text(output),
    )  # fmt: skip
    sources = (forget if forget is not None else settings.forget, retain if retain is not None else settings.retain)
    for name, value, needed in (
        ("base", settings.base, True),
        ("forget", sources[0], settings.trains),
        ("retain", sources[1], settings.trains and settings.needs_retain),
        ("output", settings.output, True),
    ):
        if value is None and needed:
            raise UsageError(f"nothing was given for {name}", hint=f"add --{name} (or {name}: in the recipe)")
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("accelerate", "train") from error
    if settings.method == "direct":
        from uld_sdk.direct import train_direct

        return train_direct(settings, sources, on_progress)
    if settings.method == "offset":
        from uld_sdk.offset import train_offset

        return train_offset(settings, sources, on_progress)
    return _train(settings, sources, on_progress)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _train(recipe: "Recipe", sources: tuple[Any, Any], on_progress: OnProgress | None) -> TrainResult:
    from uld_offset_models.artifact import save_artifact
    from uld_offset_models.holdout import Watch
    from uld_offset_models.keeping import keep
    from uld_offset_models.network import build_assistant
    from uld_offset_models.processes import from_main
    from uld_offset_models.steps import Steps

    read = read_sets(recipe, sources)
    if recipe.stop_untouched is not None and not read.sets.holdout:
        raise UsageError("--stop-untouched watches a hold-out, and there is none", hint="raise --holdout, or leave --stop-untouched out")
    prepared = prepare(recipe, read, outcome=_OUTCOME, more={})
    checkpoint = prepared.checkpoint()
    assistant = build_assistant(
        prepared.base, prepared.tokenizer, rank=recipe.rank, lora_alpha=recipe.lora_alpha, gate=recipe.gate, seed=recipe.seed
    )

    sets, batch, total = (prepared.forget, prepared.retain), recipe.batch_size, prepared.total

    def dealt(first: int, rank: int, world: int) -> Steps:
        return Steps(*sets, batch=batch, seed=recipe.seed, first=first, last=total, rank=rank, world=world)

    watch = Watch(prepared.forget, prepared.holdout, recipe.margin, recipe.stop_untouched)
    trained = carry_out(prepared, assistant, watch, dealt, checkpoint=checkpoint, on_progress=on_progress)

    def save() -> "Manifest":
        manifest = _manifest(prepared, trained, assistant)
        return save_artifact(
            prepared.output,
            model=assistant.adapter,
            gate=assistant.gate,
            tokenizer=prepared.tokenizer,
            manifest=manifest,
            overwrite=recipe.overwrite,
        )

    manifest = from_main(lambda: keep(prepared.output, save, trained=trained.end))
    return TrainResult(prepared.output, manifest, trained.end.seconds, trained.end.history)


def _manifest(prepared: Prepared, trained: Trained, assistant: "Assistant") -> "Manifest":
    from uld_offset_models.manifest import Manifest

    recipe = prepared.recipe
    return Manifest(
        **account(prepared, trained, losses=("remember", "uniform"), apart=()),
        alpha=prepared.alpha,
        margin=recipe.margin,
        filter=recipe.filter,
        gate=recipe.gate,
        assistant_parameters=sum(p.numel() for p in {id(p): p for p in assistant.parameters()}.values()),
        trainable_parameters=sum(p.numel() for p in assistant.trained().values()),
    )
