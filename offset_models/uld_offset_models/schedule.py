"""The learning rate over a run, as a share of its first value."""

import math


def multiplier(schedule: str, step: int, total: int) -> float:
    """Share of the rate at `step` (from 0) of `total`: constant 1, linear to 0, or half a cosine to 0."""
    part = min(step / max(total, 1), 1.0)
    if schedule == "linear":
        return 1.0 - part
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * part))
    return 1.0
