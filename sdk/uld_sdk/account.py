"""What a manifest tells of a training, whatever its method: the base, the versions, the losses at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uld_offset_models.checkpoint import Checkpoint
    from uld_offset_models.manifest import BaseReference
    from uld_offset_models.recipes import Recipe

_PACKAGES = ("uld-sdk", "torch", "transformers", "peft", "accelerate")
_LAST = 5  # steps


def base_reference(recipe: "Recipe", sha256: str, *, layers: int) -> "BaseReference":
    """The recipe's base, a local one by its whole path; `layers` are those that the model has now."""
    from uld_offset_models.manifest import BaseReference

    where = Path(recipe.base or "").expanduser()
    name = str(where.resolve()) if where.exists() else str(recipe.base)
    return BaseReference(id=name, sha256=sha256, layers=layers, truncated=recipe.layers is not None)


def mean_of_last(trained: "Checkpoint", names: Sequence[str]) -> dict[str, float]:
    """Means of these losses over the last steps that led to the weights which are kept."""
    last = [entry for entry in trained.history if entry["step"] <= trained.step][-_LAST:]
    return {name: sum(entry[name] for entry in last) / len(last) for name in names}


def installed_versions() -> dict[str, str]:
    """The versions of the packages that a training depends on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {name: installed(name) for name in _PACKAGES}
