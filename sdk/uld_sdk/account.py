"""What a manifest tells of a training, whatever its method: base, data, settings, versions, and the losses at its end."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uld_offset_models.checkpoint import Checkpoint
    from uld_offset_models.manifest import BaseReference
    from uld_offset_models.recipes import Recipe
    from uld_sdk.preparation import Prepared, Trained

_PACKAGES = ("uld-sdk", "torch", "transformers", "peft", "accelerate")
_LAST = 5  # steps


def account(prepared: "Prepared", trained: "Trained", *, losses: Sequence[str], apart: Sequence[str]) -> dict[str, Any]:
    """The fields that every manifest has; the settings named `apart` have fields of their own and stay out of `training`."""
    from uld_adapters.vocabulary.tokens import tokenizer_fingerprint

    recipe, end = prepared.recipe, trained.end
    settings = {name: value for name, value in end.run.items() if name not in {"base", "forget", "retain", *apart}}
    figures = {f"final_{name}": value for name, value in end.last.items() if name != "step"}
    return {
        "preset": recipe.preset,
        "base": _base_reference(recipe, end.run["base"], layers=prepared.base.config.num_hidden_layers),
        "tokenizer_sha256": tokenizer_fingerprint(prepared.tokenizer),
        "chat_template": prepared.chat,
        "dtype": end.run["dtype"],
        "training": {**settings, **figures, "loading_seconds": trained.loading_seconds},
        "data": {name: end.run[name] for name in ("forget", "retain")},
        "versions": _installed_versions(),
        "training_seconds": round(end.seconds, 3),
        "losses": _mean_of_last(end, losses),
        "steps": end.step,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _base_reference(recipe: "Recipe", sha256: str, *, layers: int) -> "BaseReference":
    """The recipe's base, a local one by its whole path; `layers` are those that the model has now."""
    from uld_offset_models.manifest import BaseReference

    where = Path(recipe.base or "").expanduser()
    name = str(where.resolve()) if where.exists() else str(recipe.base)
    return BaseReference(id=name, sha256=sha256, layers=layers, truncated=recipe.layers is not None)


def _mean_of_last(end: "Checkpoint", names: Sequence[str]) -> dict[str, float]:
    """Means of these losses over the last steps that led to the weights which are kept, nothing where there was no step."""
    last = [entry for entry in end.history if entry["step"] <= end.step][-_LAST:]
    return {name: sum(entry[name] for entry in last) / len(last) for name in names if last}


def _installed_versions() -> dict[str, str]:
    """The versions of the packages that a training depends on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {name: installed(name) for name in _PACKAGES}
