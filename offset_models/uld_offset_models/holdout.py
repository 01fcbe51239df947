"""What is measured while training, above all on the hold-out of the retain set, and when that ends the run."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from uld_offset_models.checkpoint import restore_weights, weights_of
from uld_offset_models.encoding import Encoded
from uld_offset_models.network import Assistant

if TYPE_CHECKING:
    from uld_offset_models.white_box import WhiteBox

LEARNED = 0.05  # share of forget answers that may still stand untouched when the forget set counts as learned
DEFAULT_MARGIN = 3.0  # nats: what a preset without a margin is measured at
_MOST = 64  # rows of either set looked at in one check
_CHECKS, _CHECKS_THAT_STOP = 5, 20  # in one run; a check costs about as much as two steps


class Watching(Protocol):
    """What a run asks of its watch: figures now and then, whether to stop, which weights to keep."""

    kept: dict[str, Tensor]
    kept_at: dict[str, float]
    last: dict[str, float]

    def every(self, total: int) -> int:
        """Steps between two checks of a run of `total` steps."""

    def check(self, assistant: Any, step: int) -> dict[str, float]:
        """Measure the model after `step` steps."""

    def should_stop(self) -> bool:
        """Whether the last check ends the run."""

    def settle(self, assistant: Any) -> dict[str, float]:
        """At the end: put the weights to keep in place; returns the figures of these."""


@dataclass
class Watch:
    """Checks the untouched shares, and says when to stop and which weights to keep.

    Rule of `stop_untouched` X: a check is good when the forget set is learned (at most `LEARNED` of its answers untouched) and at
    least X of the hold-out is untouched. The run ends at the first check under X that follows a good one, and the weights of
    the last good check are kept; so they are when a run ends under X for another reason. Before the first good check nothing
    stops: while the gate opens the share dips and comes back. Without a good check the last weights stay, with a warning.
    """

    forget: Sequence[Encoded]
    holdout: Sequence[Encoded]
    margin: float
    stop_untouched: float | None
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_at: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def every(self, total: int) -> int:
        """Steps between two checks of a run of `total` steps."""
        return max(1, total // (_CHECKS if self.stop_untouched is None else _CHECKS_THAT_STOP))

    def check(self, assistant: Assistant, step: int) -> dict[str, float]:
        """Measure both shares after `step` steps."""
        margin = self.margin or DEFAULT_MARGIN
        shares = {"step": float(step), "forget_untouched": assistant.untouched_share(self.forget[:_MOST], margin=margin)}
        if self.holdout:
            shares["retain_untouched"] = assistant.untouched_share(self.holdout[:_MOST], margin=margin)
        self.last = shares
        if self.stop_untouched is not None and not self._short() and shares["forget_untouched"] <= LEARNED:
            self.kept, self.kept_at = weights_of(assistant.trained()), shares
        return shares

    def should_stop(self) -> bool:
        """Whether the hold-out has fallen under the bound after a good check."""
        return bool(self.kept) and self._short()

    def settle(self, assistant: Assistant) -> dict[str, float]:
        """At the end: go back to the last good weights if the last ones fall short; returns the shares of the weights kept."""
        if self._short() and self.kept:
            restore_weights(assistant.trained(), self.kept)
            self.last = self.kept_at
        elif self._short():
            warnings.warn(
                f"--stop-untouched {self.stop_untouched:g} was never met: at no check was so much of the retain hold-out untouched with "
                f"the forget set learned (at the end {self.last['retain_untouched']:.0%}, and {self.last['forget_untouched']:.0%} of the "
                "forget answers); the last weights are kept. Train longer, or give more retain rows near the topic",
                UserWarning,
                stacklevel=2,
            )
        return self.last

    def _short(self) -> bool:
        return self.stop_untouched is not None and self.last.get("retain_untouched", 1.0) < self.stop_untouched


@dataclass
class LikelihoodWatch:
    """Follows a white box by likelihoods, mean NLL in nats a token: of forget answers, and of the retain hold-out. It stops nothing."""

    forget: Sequence[Encoded]
    holdout: Sequence[Encoded]
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_at: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def every(self, total: int) -> int:
        """Steps between two checks of a run of `total` steps."""
        return max(1, total // _CHECKS)

    def check(self, assistant: "WhiteBox", step: int) -> dict[str, float]:
        """Measure both after `step` steps."""
        self.last = {"step": float(step), "forget_nll": assistant.mean_nll(self.forget[:_MOST])}
        if self.holdout:
            self.last["retain_nll"] = assistant.mean_nll(self.holdout[:_MOST])
        return self.last

    def should_stop(self) -> bool:
        """Never: how much may be lost is for an evaluation to say."""
        return False

    def settle(self, assistant: "WhiteBox") -> dict[str, float]:
        """The last weights are kept."""
        return self.last
