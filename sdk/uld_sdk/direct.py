"""`--method direct`: the large model's own weights are tuned to forget, as the white-box baselines of the papers do."""

from typing import TYPE_CHECKING, Any

from uld_sdk.account import account
from uld_sdk.preparation import Prepared, Trained, aim_of, carry_out, prepare, read_sets
from uld_sdk.progress import OnProgress
from uld_sdk.train_result import TrainResult

if TYPE_CHECKING:
    from uld_offset_models.direct_folder import DirectManifest
    from uld_offset_models.recipes import Recipe
    from uld_offset_models.white_box import WhiteBox

_OUTCOME = ("beta", "trainable")  # with those that every method has: what decides the weights


def train_direct(recipe: "Recipe", sources: tuple[Any, Any], on_progress: OnProgress | None) -> TrainResult:
    """Tune the base towards the recipe's objective and save a peft adapter or a whole model; see `uld_sdk.train`.

    Paraphrases of the rows are trained like the rows, wrong answers are not: they are for assistants. Without a retain objective
    the retain set may be missing.
    """
    import torch

    from uld_offset_models.direct_folder import save_direct
    from uld_offset_models.holdout import LikelihoodWatch
    from uld_offset_models.keeping import keep
    from uld_offset_models.lessons import Lessons, Reference
    from uld_offset_models.processes import from_main
    from uld_offset_models.steps import Steps
    from uld_offset_models.white_box import build_white_box

    read = read_sets(recipe, sources, perturbed=False)
    aim = aim_of(recipe, read)
    goal = aim.goal
    # A small step is lost in a bfloat16 weight.
    prepared = prepare(recipe, read, outcome=_OUTCOME, more=aim.identity, float32=recipe.trainable == "full")
    answers = dict(zip(prepared.forget, prepared.encode(aim.refusals), strict=True)) if goal.refuses else {}
    checkpoint = prepared.checkpoint()
    model = build_white_box(
        prepared.base, prepared.tokenizer, goal=goal, beta=recipe.beta, trainable=recipe.trainable, rank=recipe.rank,
        lora_alpha=recipe.lora_alpha, seed=recipe.seed, autocast=prepared.dtype == torch.bfloat16,
    )  # fmt: skip
    trained_on = (prepared.forget, prepared.retain if goal.retain != "none" else [])

    def lessons(reference: Reference, first: int = 0, rank: int = 0, world: int = 1) -> Lessons:
        steps = Steps(*trained_on, batch=recipe.batch_size, seed=recipe.seed, first=first, last=prepared.total, rank=rank, world=world)
        return Lessons(steps, goal, answers, reference)

    done = checkpoint is not None and checkpoint.finished
    # Before the run, which may put a checkpoint's weights in place.
    reference = Reference() if done else model.reference(*lessons(Reference()).rows())
    watch = LikelihoodWatch(prepared.forget, prepared.holdout)
    trained = carry_out(
        prepared,
        model,
        watch,
        lambda first, rank, world: lessons(reference, first, rank, world),
        checkpoint=checkpoint,
        on_progress=on_progress,
    )

    def save() -> "DirectManifest":
        manifest = _manifest(prepared, trained, model)
        return save_direct(prepared.output, model=model, tokenizer=prepared.tokenizer, manifest=manifest, overwrite=recipe.overwrite)

    manifest = from_main(lambda: keep(prepared.output, save, trained=trained.end))
    return TrainResult(prepared.output, manifest, trained.end.seconds, trained.end.history)


def _manifest(prepared: Prepared, trained: Trained, model: "WhiteBox") -> "DirectManifest":
    from uld_offset_models.direct_folder import DirectManifest

    return DirectManifest(
        **account(prepared, trained, losses=("forget", "retain"), apart=("objective", "method", "preset", "trainable")),
        objective=str(model.goal),
        trainable="full" if prepared.recipe.trainable == "full" else "lora",
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in model.trained().values()),
    )
