"""What a small model's probabilities of the remote's tokens are, and how far one model's lie from another's. Pure."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

Path = tuple[int, ...]
_MOST = 50.0  # nats: a ratio of which one side is 0


@dataclass(frozen=True)
class Shares:
    """S(c) of each candidate under each model, the uniform one last, shapes (models, candidates).

    `lower` and `upper` hold whatever text follows; `now` gives each text to the token that the remote's tokenizer sees if the text
    ends there. Neutral candidates have no counterpart, and no shift.
    """

    now: Float[np.ndarray, "models candidates"]
    lower: Float[np.ndarray, "models candidates"]
    upper: Float[np.ndarray, "models candidates"]
    neutral: Bool[np.ndarray, " candidates"]
    open: tuple[tuple[float, Path], ...]
    standing: tuple[tuple[Path, Float[np.ndarray, " models"]], ...] = ()


def excess(shares: Shares) -> Float[np.ndarray, "3 candidates"]:
    """Log s_a(c) - log s_u(c) in nats, its lower and its upper bound: the excess of ULD over the same sum under the uniform model."""
    return _ratio(shares, 0, -1)


def change(shares: Shares, gate: float | None) -> Float[np.ndarray, "3 candidates"]:
    """C (log s'(c) - log s(c)) in nats, its lower and its upper bound, for the models (o', o)."""
    return np.nan_to_num(_ratio(shares, 0, 1) * (1.0 if gate is None else gate), posinf=np.inf, neginf=-np.inf)  # a gate may be 0


def _ratio(shares: Shares, mine: int, other: int) -> Float[np.ndarray, "3 candidates"]:
    """Log of one model's share over another's.

    What is open hides the same spellings from both, so that their ratio as it is comes nearer to the truth than with the open mass added
    to both (less than half of the total variation, on the toys of the benchmark). Neutral candidates, and those that no text yields,
    have 0.
    """
    now, lower, upper = shares.now, shares.lower, shares.upper
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(now[mine]) - np.log(now[other])
        least, most = np.log(lower[mine]) - np.log(upper[other]), np.log(upper[mine]) - np.log(lower[other])
    least, most = np.where(np.isnan(least), -np.inf, least), np.where(np.isnan(most), np.inf, most)
    never = (upper[mine] <= 0) & (upper[other] <= 0)
    value = np.nan_to_num(value, nan=0.0, posinf=_MOST, neginf=-_MOST)
    found = np.stack([np.clip(value, least, most), least, most])
    found[:, shares.neutral | never] = 0.0
    return found
