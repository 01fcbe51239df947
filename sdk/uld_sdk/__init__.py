"""Unlearning for a language model behind a server: a small assistant corrects its log-probabilities, and nothing else changes.

`client = UnlearnedClient(backend="tgi", base_url="http://localhost:8080", assistant="assistant-folder")` answers as the model
would had it never seen the forget set; `train(...)` makes the folder. The public names below load on first use (PEP 562), so
that `import uld_sdk` costs no import of torch, numpy or the HTTP library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uld_adapters.errors import (
        ArtifactCorrupt,
        ArtifactError,
        ArtifactMismatch,
        AssistantFailed,
        AuthenticationFailed,
        BackendError,
        ContextExceeded,
        ContinuationUnavailable,
        DataError,
        LogprobsUnavailable,
        MalformedAnswer,
        MissingExtra,
        ModelNotFound,
        RequestRejected,
        SaveFailed,
        ServerBusy,
        ServerUnreachable,
        StreamInterrupted,
        TokenizerMismatch,
        TrainingDiverged,
        TrainingError,
        UldError,
        UnknownName,
        UsageError,
    )
    from uld_sdk.async_client import AsyncUnlearnedClient
    from uld_sdk.augmentation.job import augment
    from uld_sdk.augmentation.wanted import AugmentResult
    from uld_sdk.caching.asking import Cost
    from uld_sdk.caching.job import CacheResult, cache
    from uld_sdk.calibration.job import calibrate
    from uld_sdk.calibration.result import CalibrationResult
    from uld_sdk.client import UnlearnedClient
    from uld_sdk.result import Piece, Report, Result, ScoreResult, Step
    from uld_sdk.train_result import TrainResult
    from uld_sdk.training import train

__version__ = "0.1.0"

__all__ = [
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactMismatch",
    "AssistantFailed",
    "AsyncUnlearnedClient",
    "AugmentResult",
    "AuthenticationFailed",
    "BackendError",
    "CacheResult",
    "CalibrationResult",
    "ContextExceeded",
    "ContinuationUnavailable",
    "Cost",
    "DataError",
    "LogprobsUnavailable",
    "MalformedAnswer",
    "MissingExtra",
    "ModelNotFound",
    "Piece",
    "Report",
    "RequestRejected",
    "Result",
    "SaveFailed",
    "ScoreResult",
    "ServerBusy",
    "ServerUnreachable",
    "Step",
    "StreamInterrupted",
    "TokenizerMismatch",
    "TrainResult",
    "TrainingDiverged",
    "TrainingError",
    "UldError",
    "UnknownName",
    "UnlearnedClient",
    "UsageError",
    "__version__",
    "augment",
    "cache",
    "calibrate",
    "train",
]

_HOMES = {
    "uld_sdk.async_client": ("AsyncUnlearnedClient",),
    "uld_sdk.augmentation.job": ("augment",),
    "uld_sdk.augmentation.wanted": ("AugmentResult",),
    "uld_sdk.caching.asking": ("Cost",),
    "uld_sdk.caching.job": ("CacheResult", "cache"),
    "uld_sdk.calibration.job": ("calibrate",),
    "uld_sdk.calibration.result": ("CalibrationResult",),
    "uld_sdk.client": ("UnlearnedClient",),
    "uld_sdk.result": ("Piece", "Report", "Result", "ScoreResult", "Step"),
    "uld_sdk.train_result": ("TrainResult",),
    "uld_sdk.training": ("train",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name when it is first asked for; every other public name is an error class."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF.get(name, "uld_adapters.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether loaded yet or not."""
    return sorted({*globals(), *__all__})
