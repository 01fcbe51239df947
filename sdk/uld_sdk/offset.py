"""`--method offset`: a pair of small models whose difference is added to the target's logits (delta-unlearning, arXiv 2404.11045)."""

import warnings
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import UsageError
from uld_sdk.account import account
from uld_sdk.bridged_reading import bridged_side
from uld_sdk.preparation import Aim, Prepared, Read, Trained, aim_of, carry_out, prepare, read_sets
from uld_sdk.progress import OnProgress
from uld_sdk.target_reading import TargetSource, frozen_states
from uld_sdk.train_result import TrainResult

if TYPE_CHECKING:
    from torch import Tensor

    from uld_offset_models.encoding import Encoded
    from uld_offset_models.manifest import Manifest
    from uld_offset_models.offset import OffsetPair
    from uld_offset_models.offset_lessons import OffsetLessons
    from uld_offset_models.recipes import Recipe
    from uld_offset_models.target_side import TargetSide

# With those that every method has: what decides the weights.
_OUTCOME = (
    *("layers", "gate", "gate_rate", "stop_untouched", "margin"),
    *("beta", "trainable", "alpha", "trained_alpha", "tail", "virtual_tokens"),
)
_APART = ("objective", "method", "preset", "trainable", "alpha", "trained_alpha", "tail")  # in fields of the manifest's own
_MARGIN = 0.5  # nats: what a pair without a margin is measured at
_SHUT = 0.5  # share of the hold-out that should stand untouched when a gate has shut


def train_offset(recipe: "Recipe", sources: tuple[Any, Any], on_progress: OnProgress | None) -> TrainResult:
    """Train o' towards the recipe's objective on the ensemble with the target, and save the pair; see `uld_sdk.train`.

    What target and frozen model say of the texts is read once, before training. Paraphrases of the rows are trained like the rows,
    wrong answers are not. Without a retain objective the retain set may be missing.
    """
    from uld_offset_models.artifact import save_artifact
    from uld_offset_models.assistant import base_fingerprint
    from uld_offset_models.holdout import Watch
    from uld_offset_models.keeping import keep
    from uld_offset_models.processes import from_main, is_main
    from uld_offset_models.steps import Steps

    source = TargetSource.of(recipe)
    read = read_sets(recipe, sources, perturbed=False)
    if recipe.stop_untouched is not None and not read.sets.holdout:
        raise UsageError("--stop-untouched watches a hold-out, and there is none", hint="raise --holdout, or leave --stop-untouched out")
    aim = aim_of(recipe, read)
    start = None if recipe.start is None else base_fingerprint(recipe.start)
    more = {**aim.identity, "target": source.sha256, "start": start}
    # A small step is lost in a bfloat16 weight.
    prepared = prepare(recipe, read, outcome=_OUTCOME, more=more, float32=recipe.trainable == "full")
    idle = prepared.encode(aim.refusals)
    answers = dict(zip(prepared.forget, idle, strict=True)) if idle else {}
    trained_on = (prepared.forget, prepared.retain if aim.goal.retain != "none" else [])
    checkpoint = prepared.checkpoint()
    done = not recipe.trains or (checkpoint is not None and checkpoint.finished)
    pair = _build(prepared, source, read, aim, idle, done=done)

    def dealt(first: int, rank: int, world: int) -> "OffsetLessons":
        steps = Steps(*trained_on, batch=recipe.batch_size, seed=recipe.seed, first=first, last=prepared.total, rank=rank, world=world)
        return pair.lessons(steps, answers)

    watch = Watch(prepared.forget, prepared.holdout, recipe.margin or _MARGIN, recipe.stop_untouched)
    trained = carry_out(prepared, pair, watch, dealt, checkpoint=checkpoint, on_progress=on_progress)
    if is_main() and recipe.gate and trained.end.last.get("retain_untouched", 1.0) < _SHUT:
        warnings.warn(
            f"the gate has not shut: {trained.end.last['retain_untouched']:.0%} of the retain hold-out stand untouched; train longer"
            " (--steps), or give more retain rows near the topic",
            UserWarning,
            stacklevel=2,
        )

    def save() -> "Manifest":
        model = pair.model.merge_and_unload() if recipe.start is not None and recipe.trainable == "lora" else pair.model
        manifest = _manifest(prepared, trained, pair, source)
        return save_artifact(
            prepared.output, model=model, gate=pair.gate, tokenizer=prepared.tokenizer, manifest=manifest, overwrite=recipe.overwrite
        )

    manifest = from_main(lambda: keep(prepared.output, save, trained=trained.end))
    return TrainResult(prepared.output, manifest, trained.end.seconds, trained.end.history)


def _build(prepared: Prepared, source: TargetSource, read: Read, aim: Aim, idle: "list[Encoded]", *, done: bool) -> "OffsetPair":
    """The pair before its training; where that is `done`, nobody asks any more what target and frozen model say. `idle` are refusals."""
    import torch

    from uld_offset_models.assistant import Gate
    from uld_offset_models.bridged_pair import BridgedPair
    from uld_offset_models.offset import OffsetPair
    from uld_offset_models.tuned import Tuned, make_trainable

    recipe, autocast, device = prepared.recipe, prepared.dtype == torch.bfloat16, prepared.base.get_output_embeddings().weight.device
    forget = [] if aim.goal.forget == "relabel" else zip(prepared.forget, read.sets.forget, strict=True)
    retain = [] if aim.goal.retain == "none" else zip(prepared.retain, read.sets.retain, strict=True)
    rows = dict(forget) | dict(zip(idle, aim.refusals, strict=True)) | dict(retain)
    states: dict[Encoded, Tensor] = {}
    model, first_head = prepared.base, None
    frozen = Tuned(prepared.base, prepared.tokenizer, trainable="full", autocast=autocast)
    foreign = source.foreign(recipe, prepared.tokenizer)
    wanted = {} if done else rows
    side: TargetSide = bridged_side(source, prepared, wanted, frozen) if foreign else source.side(prepared, wanted)
    if not done:
        seen = [*prepared.forget, *idle, *prepared.retain, *prepared.holdout]
        states = dict(frozen_states(source, prepared, seen, frozen.states))
    if recipe.start is not None:
        first_head = Tuned(prepared.base, prepared.tokenizer, trainable="full", autocast=autocast).head.detach().clone()
        model = _start(recipe, prepared, str(device))
    trainable = make_trainable(
        model, trainable=recipe.trainable, rank=recipe.rank, lora_alpha=recipe.lora_alpha, seed=recipe.seed,
        virtual_tokens=recipe.virtual_tokens,
    )  # fmt: skip
    return (BridgedPair if foreign else OffsetPair)(
        trainable,
        prepared.tokenizer,
        goal=aim.goal,
        beta=recipe.beta,
        alpha=recipe.trained_alpha or prepared.alpha,
        gate=Gate(model.config.hidden_size, bias=0.0) if recipe.gate else None,
        target=side,
        states=states,
        trainable=recipe.trainable,
        autocast=autocast,
        first_head=first_head,
    ).to(device)


def _start(recipe: "Recipe", prepared: Prepared, device: str) -> Any:
    """The checkpoint that o' starts from, in float32, for it is saved whole; raises `UsageError` unless it is of the base's shape."""
    import torch

    from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
    from uld_offset_models.assistant import load_base

    model, tokenizer = load_base(recipe.start or "", layers=recipe.layers, dtype=torch.float32, device=device)
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(prepared.tokenizer):
        raise UsageError(f"{recipe.start} has another tokenizer than {recipe.base}", hint="--start takes a checkpoint of the base's kind")
    return model


def _manifest(prepared: Prepared, trained: Trained, pair: "OffsetPair", source: TargetSource) -> "Manifest":
    from uld_offset_models.manifest import Manifest, PairReference

    recipe = prepared.recipe
    return Manifest(
        method="offset",
        **account(prepared, trained, losses=("forget", "retain"), apart=_APART),
        alpha=prepared.alpha,
        margin=recipe.margin,
        filter=recipe.filter,
        tail=recipe.tail,
        gate=recipe.gate,
        pair=PairReference(
            objective=str(pair.goal) if recipe.trains else "none",
            alpha=recipe.trained_alpha or prepared.alpha,
            tail=recipe.tail,
            trainable=recipe.trainable,
            whole=recipe.trainable == "full" or recipe.start is not None,
            target=source.name,
            top_logprobs=source.top_logprobs,
        ),
        assistant_parameters=sum(p.numel() for p in pair.parameters()),
        trainable_parameters=sum(p.numel() for p in pair.trained().values()),
    )
