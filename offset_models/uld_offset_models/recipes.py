"""Recipes: every setting of a training run, from a preset, a YAML file and the caller's own words, in rising order."""

import math
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uld_adapters.errors import UnknownName, UsageError
from uld_offset_models.goal import parse_goal
from uld_offset_models.refusals import BUILT_IN
from uld_offset_models.shift import SIGNS

PRESETS = ("gated", "paper", "release", "direct", "offset", "offset-gated")
METHODS = {"uld": "gated", "direct": "direct", "offset": "offset"}  # each with its own preset; of a gated pair it is offset-gated
_ALPHA, _TOKENS, _STRONGEST = 0.75, 49_152, 2.0  # of the preset gated: measured with so many tokens, and at most that of others
_OFFSET = ("cache", "target", "target_tokenizer", "start", "tail", "virtual_tokens", "trained_alpha")
_OTHERS = {  # what only another method has a use for
    "uld": ("objective", "beta", "trainable", "refusals", *_OFFSET),
    "direct": ("layers", "gate", "gate_rate", "alpha", "margin", "filter", "stop_untouched", *_OFFSET),
    "offset": (),
}


class Recipe(BaseModel):
    """Every flag of `uld-sdk train`, with underscores. `margin` is in nats, `max_seconds` in seconds, `max_length` in tokens.

    `steps` wins over `epochs`; epochs run over the forget set, and never fewer than `min_steps` steps come of them. `layers`
    None keeps the whole base. `weight` is that of the uniform or retain loss, `beta` (1/nats) that of npo and dpo. Of a pair
    (method offset) `cache` or `target` says what the target thinks of the texts, `target_tokenizer` is that of a cache in other tokens
    than the base's, and `start` is where o' begins, if not at the base; in 0 steps it ends there, too. `alpha` is that of inference (None,
    of uld alone: as `strength` says), and without a `trained_alpha` that of a pair's training, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["uld", "direct", "offset"] = "uld"
    preset: str = "gated"
    base: str | None = None
    forget: str | None = None
    retain: str | None = None
    output: str | None = None
    objective: str | None = None
    beta: float = Field(default=0.1, gt=0)
    trainable: Literal["lora", "full", "p-adapter"] = "lora"
    refusals: str | None = None
    cache: str | None = None
    target: str | None = None
    target_tokenizer: str | None = None
    start: str | None = None
    tail: Literal["truncate", "complete"] = "truncate"
    virtual_tokens: int = Field(default=20, ge=1)
    layers: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=0)
    epochs: float | None = Field(default=None, gt=0)
    min_steps: int = Field(default=1, ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    gate_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["constant", "linear", "cosine"]
    weight_decay: float = Field(ge=0)
    clip: float = Field(ge=0)
    rank: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    gate: bool
    weight: float = Field(ge=0)
    alpha: float | None = Field(default=None, gt=0)
    trained_alpha: float | None = Field(default=None, gt=0)
    margin: float = Field(ge=0)
    filter: float = Field(ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**32)  # as far as numpy's generator goes
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    holdout: float = Field(default=0.1, ge=0, lt=1)
    stop_untouched: float | None = Field(default=None, ge=0, le=1)
    resume: bool = False
    checkpoint_every: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=1024, ge=2)
    max_seconds: float | None = Field(default=None, gt=0)
    chat_template: bool = True
    overwrite: bool = False
    progress: bool = True

    @property
    def trains(self) -> bool:
        """Whether anything is trained: in 0 steps a pair is made of two checkpoints, and no set is needed."""
        return self.steps != 0

    @property
    def needs_retain(self) -> bool:
        """Whether a retain set is needed: a goal without a retain objective can do without."""
        return self.method == "uld" or parse_goal(self.objective or "").retain != "none"

    def strength(self, tokens: int) -> float:
        """The alpha of inference: what was said, else by how many tokens the small model has, |B|.

            alpha = .75 (ln 49152 - tau) / (ln |B| - tau), no less than .75 and at most 2

        One token can lose alpha (ln |B| - tau) nats: with fewer tokens than those of the model on which .75 was measured no less.
        Where no token exceeds the margin tau there is nothing to make up for.
        """
        if self.alpha is not None:
            return self.alpha
        over, usual = math.log(tokens) - self.margin, math.log(_TOKENS) - self.margin
        if over <= 0 or usual <= over:
            return _ALPHA
        return min(_STRONGEST, round(_ALPHA * usual / over, 4))

    def step_count(self, forget_rows: int) -> int:
        """Optimiser steps for so many forget rows."""
        if self.steps is not None:
            return self.steps
        per_epoch = -(-forget_rows // min(self.batch_size, forget_rows))
        return max(self.min_steps, round((self.epochs or 1.0) * per_epoch))


def preset_values(name: str) -> dict[str, Any]:
    """The settings of one of the `PRESETS`."""
    text = (resources.files("uld_offset_models") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return _mapping(text, f"preset {name}")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, dashes or underscores; raises `UsageError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe {path} is not UTF-8 (byte {error.start})", hint="save the file as UTF-8") from error
    except OSError as error:
        raise UsageError(
            f"the recipe {path} cannot be read: {error.strerror}", hint="give a YAML file with any flag of `uld-sdk train`"
        ) from error
    return _mapping(text, str(path))


def resolve(*, recipe: str | Path | None = None, preset: str | None = None, **settings: Any) -> Recipe:
    """Merge preset, recipe file and explicit settings (None = not given); raises `UsageError` naming what is wrong.

    A later one wins. Steps and epochs are one setting in two units: either takes the place of what was said before in the other,
    and within one of the three steps win.
    """
    written = read_recipe(recipe) if recipe is not None else {}
    from_file = {name for name in written if settings.get(name) is None} - ({"preset"} if preset else set())

    def place(name: str) -> str:
        """Where a setting was made, in the words of who made it."""
        return f"{name} in the recipe {recipe}" if name in from_file else f"--{name.replace('_', '-')}"

    def unknown(what: str, name: str, value: Any, known: Iterable[str]) -> UnknownName:
        return UnknownName(f"{what} in the recipe {recipe}:" if name in from_file else what, str(value), known)

    method = settings.get("method") or written.get("method")
    if method is not None and str(method) not in METHODS:
        raise unknown("method", "method", method, METHODS)
    gated = written.get("gate") if settings.get("gate") is None else settings["gate"]
    usual = "offset-gated" if method == "offset" and gated else METHODS[method or "uld"]
    preset = str(preset or written.get("preset") or usual)
    if preset not in PRESETS:
        raise unknown("preset", "preset", preset, PRESETS)
    own = preset_values(preset)
    values = dict(own)
    for layer in (written, settings):
        said = {name: value for name, value in layer.items() if value is not None}
        if "epochs" in said:  # whoever says epochs means them, whatever was said below of steps
            values |= {"steps": None, "min_steps": 1}
        values |= said
    values["preset"] = preset
    _check_method(values, own, preset, place)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown("setting", name, name, Recipe.model_fields) from error
        raise UsageError(f"{name}: {first['msg']} (got {first['input']!r})", hint=f"correct {place(name)}") from error


def _check_method(values: dict[str, Any], own: dict[str, Any], preset: str, place: Callable[[str], str]) -> None:
    """Refuse a preset of another method, settings that the method has no use for, and an objective that is none.

    `place` says where a setting was made.
    """
    method = values["method"]
    if method != own["method"]:
        raise UsageError(
            f"preset {preset} is for --method {own['method']}, not {method}", hint=f"leave out {place('preset')}, or take {METHODS[method]}"
        )
    for name in _OTHERS[method]:
        if values.get(name) != own.get(name):
            where = place(name)
            raise UsageError(f"{where} is no setting of --method {method}", hint=f"leave {where} out, or choose another --method")
    for name in ("alpha", "trained_alpha"):
        alpha = values.get(name)
        if isinstance(alpha, int | float) and not alpha > 0:
            raise UsageError(f"{name} is {alpha}", hint=f"give a number above 0; {SIGNS[method]}")
    if values.get("steps") == 0 and values.get("start") is None:
        raise UsageError("nothing is learned in 0 steps", hint=f"raise {place('steps')}; 0 is for a pair of two checkpoints (--start)")
    if values.get("steps") == 0:
        for name, why in (("gate", "it would stay untrained"), ("cache", "nobody would read it"), ("target", "nobody would ask it")):
            if values.get(name):
                raise UsageError(
                    f"a pair of two checkpoints is not trained, and has no use for {place(name)}: {why}",
                    hint=f"leave {place(name)} out, or train: {place('steps')} of 1 or more",
                )
    if method == "uld":
        return
    if method == "direct" and values.get("trainable") == "p-adapter":
        raise UsageError("a p-adapter is no part of --method direct", hint="choose --trainable lora or full, or --method offset")
    if values.get("start") is not None and values.get("trainable") == "p-adapter":
        raise UsageError("a p-adapter stands before the base itself", hint="leave --start out, or choose --trainable lora or full")
    goal = parse_goal(str(values.get("objective")))
    if values.get("refusals") is not None and not goal.refuses:
        raise UsageError(f"the objective {goal} uses no refusals", hint=f"leave {place('refusals')} out, or choose dpo or relabel")
    if values.get("refusals") is None and goal.refuses:
        raise UsageError(
            f"the objective {goal} trains refusals, and none were given",
            hint=f"add --refusals FILE, one a line, or --refusals {BUILT_IN} for a list of ours",
        )


def _mapping(text: str, label: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{label} is not valid YAML: {' '.join(str(error).split())}", hint="write one `name: value` a line") from error
    if not isinstance(value, dict):
        raise UsageError(f"{label} holds no settings", hint="write one `name: value` a line")
    return {str(key).replace("-", "_"): item for key, item in value.items()}
