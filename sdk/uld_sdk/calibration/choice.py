"""Which point of a sweep is taken, and the grids that are swept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uld_adapters.errors import UsageError
from uld_sdk.calibration.sweep import Point

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
MARGINS = (0.5, 1.0, 2.0, 3.0, 4.0)  # nats
FILTERS = (0.01,)
PAIR_FILTERS = (0.0,)  # off: a pair may promote what lies far below the best
Values = str | float | Sequence[float]


@dataclass(frozen=True)
class Thresholds:
    """The rule of choice: at least these shares of forget answers changed and of retain answers identical."""

    forget_changed: float = 0.95
    retain_identical: float = 0.9

    def __post_init__(self) -> None:
        for name in ("forget_changed", "retain_identical"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is {value!r}, no share", hint=f"give {option} a number from 0 to 1")

    @property
    def text(self) -> str:
        """The rule in words."""
        return (
            f"the smallest alpha, then the largest margin, then the smallest filter, with at least {self.forget_changed:.4g} of the forget "
            f"answers changed among those with at least {self.retain_identical:.4g} of the retain answers identical"
        )

    def choose(self, points: Sequence[Point]) -> Point | None:
        """The point that the rule takes, None where none meets both thresholds."""
        return min((point for point in points if self.shortfall(point) == 0), key=_order, default=None)

    def nearest(self, points: Sequence[Point]) -> Point:
        """The point that falls least short of both together."""
        return min(points, key=lambda point: (self.shortfall(point), *_order(point)))

    def shortfall(self, point: Point) -> float:
        """How much the two shares fall short of the thresholds, added up."""
        return max(0.0, self.forget_changed - point.forget_changed) + max(0.0, self.retain_identical - point.retain_identical)


def _order(point: Point) -> tuple[float, float, float]:
    return point.alpha, -point.margin, point.filter


def grid_values(option: str, given: Values | None, default: Sequence[float], *, own: float) -> list[float]:
    """The values of one axis, rising: what was given ("0.5,0.75" or numbers), else the default and the artifact's `own`.

    Alphas are above 0, margins 0 or more, filters 0 (off) or more and less than 1. Raises `UsageError` naming the option.
    """
    if given is None:
        return sorted({*default, own})
    if isinstance(given, int | float):
        given = [given]
    said: Sequence[object] = [part.strip() for part in given.split(",")] if isinstance(given, str) else given
    kind, low, high, closed = _LIMITS[option]
    hint = f"{option} takes {kind}s with commas between them, such as {','.join(f'{value:g}' for value in default)}"
    values = set()
    for item in said:
        try:
            value = float(item)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = np.nan
        if not (low < value < high or (closed and value == low)):
            raise UsageError(f"{option} holds {item!r}, which is no {kind}", hint=hint)
        values.add(value)
    if not values:
        raise UsageError(f"{option} is empty", hint=hint)
    return sorted(values)


_LIMITS = {
    "--alphas": ("positive number", 0.0, np.inf, False),
    "--margins": ("number of 0 or more", 0.0, np.inf, True),
    "--filters": ("number from 0 to less than 1", 0.0, 1.0, True),
}
