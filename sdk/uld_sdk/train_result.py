"""What a training gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uld_offset_models.direct_folder import DirectManifest
    from uld_offset_models.manifest import Manifest


@dataclass(frozen=True)
class TrainResult:
    """A finished training: the folder and its manifest, seconds of training, and the losses of each step (nats).

    Every entry of `history` has step, remember, uniform, loss and seconds; some also forget_untouched and retain_untouched, the
    shares of answers (of the forget set, of the retain hold-out) that stand untouched at every position. With the other methods it is
    forget and retain in the place of remember and uniform; with direct also forget_nll and retain_nll, mean NLL in nats a token, in
    that of shares.
    """

    path: Path
    manifest: "Manifest | DirectManifest"
    seconds: float
    history: list[dict[str, float]]
