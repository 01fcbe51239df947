"""From a base, a forget set and a retain set to a saved assistant or tuned model: `uld_sdk.train(...)`, which `uld-sdk train` calls."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import MissingExtra, UsageError
from uld_sdk.account import base_reference, installed_versions, mean_of_last
from uld_sdk.progress import OnProgress, progress_bar

if TYPE_CHECKING:
    from uld_offset_models.checkpoint import Checkpoint
    from uld_offset_models.direct_folder import DirectManifest
    from uld_offset_models.manifest import Manifest
    from uld_offset_models.recipes import Recipe

Data = str | Path | Sequence[Mapping[str, Any]]
# What decides the weights, apart from data and base: a checkpoint goes on only under the same values.
_OUTCOME = (
    "method preset layers batch_size learning_rate schedule weight_decay clip rank lora_alpha gate weight seed holdout stop_untouched "
    "max_length chat_template margin"
).split()


@dataclass(frozen=True)
class TrainResult:
    """A finished training: the folder and its manifest, seconds of training, and the losses of each step (nats).

    Every entry of `history` has step, remember, uniform, loss and seconds; some also forget_untouched and retain_untouched, the
    shares of answers (of the forget set, of the retain hold-out) that stand untouched at every position. With method direct it is
    forget and retain in the place of remember and uniform, and forget_nll and retain_nll, mean NLL in nats a token, in that of shares.
    """

    path: Path
    manifest: "Manifest | DirectManifest"
    seconds: float
    history: list[dict[str, float]]


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
    layers: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    min_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    schedule: str | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    rank: int | None = None,
    lora_alpha: int | None = None,
    gate: bool | None = None,
    weight: float | None = None,
    alpha: float | None = None,
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

    With method "direct" tune `base` itself towards an objective such as "npo+kl", and save a peft adapter or a whole model.
    Settings come from the preset ("gated" unless said otherwise, "direct" with that method), then the recipe file, then the
    arguments. `forget` and `retain` are paths, hub names or lists of dicts; `max_seconds` bounds the training loop; `on_progress`
    is called after every step, of several processes in rank 0 alone. Raises `UsageError`, `DataError`, `TrainingDiverged`, `SaveFailed`,
    and `TrainingError` when interrupted.
    """
    from uld_offset_models.recipes import resolve

    settings = resolve(
        recipe=recipe, preset=preset, method=method, objective=objective, beta=beta, trainable=trainable,
        refusals=None if refusals is None else str(refusals), layers=layers,
        steps=steps, epochs=epochs, min_steps=min_steps, batch_size=batch_size,
        learning_rate=learning_rate, schedule=schedule, weight_decay=weight_decay, clip=clip, rank=rank, lora_alpha=lora_alpha, gate=gate,
        weight=weight, alpha=alpha, margin=margin, filter=filter, seed=seed, device=device, dtype=dtype, holdout=holdout,
        stop_untouched=stop_untouched, resume=resume, checkpoint_every=checkpoint_every, max_length=max_length, max_seconds=max_seconds,
        chat_template=chat_template, overwrite=overwrite, progress=progress, base=None if base is None else str(base),
        output=None if output is None else str(output),
    )  # fmt: skip
    sources = (forget if forget is not None else settings.forget, retain if retain is not None else settings.retain)
    for name, value in (("base", settings.base), ("forget", sources[0]), ("retain", sources[1]), ("output", settings.output)):
        if value is None and (name != "retain" or settings.needs_retain):
            raise UsageError(f"nothing was given for {name}", hint=f"add --{name} (or {name}: in the recipe)")
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("accelerate", "train") from error
    if settings.method == "direct":
        from uld_sdk.direct import train_direct

        return train_direct(settings, sources, on_progress)
    return _train(settings, sources, on_progress)


def _train(recipe: "Recipe", sources: tuple[Any, Any], on_progress: OnProgress | None) -> TrainResult:
    from accelerate import PartialState

    from uld_offset_models.artifact import check_output, save_artifact
    from uld_offset_models.assistant import base_fingerprint, load_base
    from uld_offset_models.checkpoint import load_checkpoint
    from uld_offset_models.data import build_sets, data_hash, read_rows
    from uld_offset_models.device import choose_device, choose_dtype
    from uld_offset_models.encoding import encode, uses_chat_template
    from uld_offset_models.holdout import Watch
    from uld_offset_models.keeping import keep
    from uld_offset_models.network import build_assistant
    from uld_offset_models.processes import from_main, is_main
    from uld_offset_models.run import Run
    from uld_offset_models.steps import Steps
    from uld_offset_models.trainer import fit

    output = Path(recipe.output or "")
    check_output(output, overwrite=recipe.overwrite)
    rows = [read_rows(source, name=name) for source, name in zip(sources, ("forget", "retain"), strict=True)]
    sets = build_sets(rows[0], rows[1], holdout=recipe.holdout, seed=recipe.seed)
    if recipe.stop_untouched is not None and not sets.holdout:
        raise UsageError("--stop-untouched watches a hold-out, and there is none", hint="raise --holdout, or leave --stop-untouched out")
    device = choose_device(recipe.device)
    PartialState(cpu=device == "cpu")  # several processes meet here, if there are several
    dtype = choose_dtype(recipe.dtype, device)
    began = time.perf_counter()
    base, tokenizer = load_base(recipe.base or "", layers=recipe.layers, dtype=dtype, device=device)
    chat = uses_chat_template(tokenizer, wanted=recipe.chat_template)
    longest = min(recipe.max_length, getattr(base.config, "max_position_embeddings", None) or recipe.max_length)
    parts = [encode(tokenizer, part, chat_template=chat, max_length=longest) for part in (sets.forget, sets.retain, sets.holdout)]
    total = recipe.step_count(len(parts[0]))
    identity = {
        **{name: getattr(recipe, name) for name in _OUTCOME},
        "steps": total,
        "dtype": str(dtype).removeprefix("torch."),
        "base": base_fingerprint(recipe.base or ""),
        "forget": data_hash(rows[0]),
        "retain": data_hash(rows[1]),
    }
    checkpoint = load_checkpoint(output, identity) if recipe.resume else None
    assistant = build_assistant(base, tokenizer, rank=recipe.rank, lora_alpha=recipe.lora_alpha, gate=recipe.gate, seed=recipe.seed)
    watch = Watch(parts[0], parts[2], recipe.margin, recipe.stop_untouched)

    def dealt(first: int, rank: int, world: int) -> Steps:
        return Steps(parts[0], parts[1], batch=recipe.batch_size, seed=recipe.seed, first=first, last=total, rank=rank, world=world)

    with progress_bar(shown=recipe.progress and is_main(), on_progress=on_progress) as report:
        run = Run(
            assistant,
            recipe,
            total=total,
            watch=watch,
            output=output,
            identity=identity,
            checkpoint=checkpoint,
            on_progress=report,
        )
        trained = fit(run, dealt)
    loading = time.perf_counter() - began - trained.seconds

    def save() -> "Manifest":
        manifest = _manifest(recipe, trained, assistant, tokenizer, chat=chat, loading_seconds=loading)
        assistant.adapter.peft_config["default"].base_model_name_or_path = manifest.base.id
        return save_artifact(
            output, adapter=assistant.adapter, gate=assistant.gate, tokenizer=tokenizer, manifest=manifest, overwrite=recipe.overwrite
        )

    return TrainResult(output, from_main(lambda: keep(output, save, trained=trained)), trained.seconds, trained.history)


def _manifest(recipe: "Recipe", trained: "Checkpoint", assistant: Any, tokenizer: Any, *, chat: bool, loading_seconds: float) -> "Manifest":
    from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
    from uld_offset_models.manifest import Manifest

    identity = trained.run
    settings = {k: v for k, v in identity.items() if k not in {"base", "forget", "retain"}}
    shares = {f"final_{name}": value for name, value in trained.last.items() if name != "step"}
    return Manifest(
        preset=recipe.preset,
        base=base_reference(recipe, identity["base"], layers=assistant.adapter.config.num_hidden_layers),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        chat_template=chat,
        alpha=recipe.alpha,
        margin=recipe.margin,
        filter=recipe.filter,
        gate=recipe.gate,
        dtype=identity["dtype"],
        training={**settings, **shares, "loading_seconds": loading_seconds},
        data={"forget": identity["forget"], "retain": identity["retain"]},
        versions=installed_versions(),
        training_seconds=round(trained.seconds, 3),
        losses=mean_of_last(trained, ("remember", "uniform")),
        steps=trained.step,
        assistant_parameters=sum(p.numel() for p in {id(p): p for p in assistant.parameters()}.values()),
        trainable_parameters=sum(p.numel() for p in assistant.trained().values()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
