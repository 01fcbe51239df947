"""What a calibration gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from uld_offset_models.shift import Rule
from uld_sdk.calibration.choice import Thresholds
from uld_sdk.calibration.sweep import Point


@dataclass(frozen=True)
class CalibrationResult:
    """A finished sweep: every point of the grid, the one that the rule chose (None: none meets it), and the `nearest` to the rule.

    `before` is what the artifact's manifest said, `written` whether it says the chosen values now. `requests` counts HTTP requests,
    those of probing the server included (a local model makes none); it does not depend on the grid.
    """

    path: Path
    rule: str
    thresholds: Thresholds
    chosen: Point | None
    nearest: Point
    before: Rule
    written: bool
    points: tuple[Point, ...] = field(repr=False)
    rows: Mapping[str, int]
    holdout: Mapping[str, str]
    apart_from: Sequence[str]
    target: str
    top_logprobs: int | None
    requests: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of all of it."""
        return {**asdict(self), "path": str(self.path), "rows": dict(self.rows), "holdout": dict(self.holdout)}
