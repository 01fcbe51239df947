"""The hold-out of the retain set: how much of it stays untouched while training, and when that ends the run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from uld_offset_models.checkpoint import restore_weights, weights_of
from uld_offset_models.encoding import Encoded
from uld_offset_models.network import Assistant

LEARNED = 0.05  # share of forget answers that may still stand untouched when the forget set counts as learned
DEFAULT_MARGIN = 3.0  # nats: what a preset without a margin is measured at
_MOST = 64  # rows of either set looked at in one check


@dataclass
class Watch:
    """Checks the untouched shares and remembers the best weights.

    Rule of `stop_untouched` X: among checks whose hold-out share is at least X, the best has the smallest untouched share of
    forget answers, the latest of equals. The run stops at the first check after that share fell to `LEARNED` or less at which
    the hold-out share is under X, and goes back to the best weights. The same happens at the end of a run that ends under X.
    Without a check that reaches X the last weights stay.
    """

    forget: Sequence[Encoded]
    holdout: Sequence[Encoded]
    margin: float
    stop_untouched: float | None
    best: dict[str, Tensor] = field(default_factory=dict)
    best_at: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def check(self, assistant: Assistant, step: int) -> dict[str, float]:
        """Measure both shares after `step` steps."""
        margin = self.margin or DEFAULT_MARGIN
        shares = {"step": float(step), "forget_untouched": assistant.untouched_share(self.forget[:_MOST], margin=margin)}
        if self.holdout:
            shares["retain_untouched"] = assistant.untouched_share(self.holdout[:_MOST], margin=margin)
        self.last = shares
        if (
            self.stop_untouched is not None
            and self._reaches(shares)
            and shares["forget_untouched"] <= self.best_at.get("forget_untouched", 1.0)
        ):
            self.best, self.best_at = weights_of(assistant.trained()), shares
        return shares

    def should_stop(self) -> bool:
        """Whether the forget set was learned and the hold-out has now fallen under the bound."""
        learned = min(self.last.get("forget_untouched", 1.0), self.best_at.get("forget_untouched", 1.0)) <= LEARNED
        return self.stop_untouched is not None and bool(self.last) and learned and not self._reaches(self.last)

    def settle(self, assistant: Assistant) -> dict[str, float]:
        """At the end: go back to the best weights if the last ones fall short; returns the shares of the weights kept."""
        if self.stop_untouched is not None and self.best and self.last and not self._reaches(self.last):
            restore_weights(assistant.trained(), self.best)
            self.last = self.best_at
        return self.last

    def _reaches(self, shares: dict[str, float]) -> bool:
        return self.stop_untouched is None or shares.get("retain_untouched", 1.0) >= self.stop_untouched
