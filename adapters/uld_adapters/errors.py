"""Every error the project raises, in one tree.

UldError
├── UsageError                  the caller can fix it in the command or the call (exit code 2)
│   ├── UnknownName             a backend, preset or dialect that does not exist
│   └── MissingExtra            an optional dependency is not installed
├── BackendError                the remote model or its server (exit code 1)
│   ├── ServerUnreachable       nothing answers at the address                      retryable
│   ├── ServerBusy              408, 409, 429 or 5xx                                retryable
│   ├── StreamInterrupted       the answer broke off                                retryable
│   ├── MalformedAnswer         the answer cannot be trusted                        retryable
│   ├── AuthenticationFailed    401 or 403
│   ├── ModelNotFound           404 or 405
│   ├── RequestRejected         any other 4xx
│   │   └── ContextExceeded     prompt and answer do not fit the context
│   ├── LogprobsUnavailable     the server reports no log-probabilities
│   └── ContinuationUnavailable the server cannot go on from a given answer
├── TokenizerMismatch           two sides do not speak the same tokens
├── ArtifactError               the folder of a trained assistant
│   ├── ArtifactCorrupt         missing, truncated or edited files
│   └── ArtifactMismatch        made for another base or tokenizer
├── DataError                   a forget or retain set cannot be used
└── TrainingError
    ├── TrainingDiverged        the loss is not finite
    └── SaveFailed              the disk is full or not writable
"""

import difflib
from collections.abc import Iterable


class UldError(Exception):
    """Base of all errors; `hint` names the fix and `retryable` says whether the same call may succeed later."""

    retryable = False
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message


class UsageError(UldError):
    """The caller can fix it in the command or the call."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is not registered; the message lists the nearest names and all of them."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(names)}", hint=hint)


class MissingExtra(UsageError):
    """An optional dependency is not installed; the hint is the pip line."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", hint=f"pip install 'uld-sdk[{extra}]'")


class BackendError(UldError):
    """The remote model or its server failed; `status` and `request_id` are set when the server gave them."""

    def __init__(self, message: str, *, hint: str = "", status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.request_id = request_id


class ServerUnreachable(BackendError):
    """Nothing answers at the address."""

    retryable = True


class ServerBusy(BackendError):
    """HTTP 408, 409, 429 or 5xx; `retry_after` is the server's wish in seconds."""

    retryable = True
    retry_after: float | None = None


class StreamInterrupted(BackendError):
    """The answer broke off before its end."""

    retryable = True


class MalformedAnswer(BackendError):
    """The answer lacks something that verification needs, or contradicts itself."""

    retryable = True


class AuthenticationFailed(BackendError):
    """HTTP 401 or 403."""


class ModelNotFound(BackendError):
    """HTTP 404 or 405: no such model or, with `missing_route`, no such route."""

    missing_route = False


class RequestRejected(BackendError):
    """Any other 4xx: the request itself is wrong."""


class ContextExceeded(RequestRejected):
    """Prompt and answer do not fit the model's context."""


class LogprobsUnavailable(BackendError):
    """The server reports no log-probabilities, so nothing could be verified."""


class ContinuationUnavailable(BackendError):
    """The server cannot go on from a given answer, and this answer needs it to."""


class TokenizerMismatch(UldError):
    """Two sides do not speak the same tokens."""


class ArtifactError(UldError):
    """The folder of a trained assistant cannot be used."""


class ArtifactCorrupt(ArtifactError):
    """Files of the artifact are missing, truncated or edited."""


class ArtifactMismatch(ArtifactError):
    """The artifact was made for another base model or tokenizer."""


class AssistantFailed(ArtifactError):
    """The assistant gave values that are no numbers; nothing can be verified with them."""


class DataError(UldError):
    """A forget or retain set cannot be used; the message names file and line."""


class TrainingError(UldError):
    """Training could not go on."""


class TrainingDiverged(TrainingError):
    """The loss is not finite."""


class SaveFailed(TrainingError):
    """Files could not be written: the disk is full or the folder not writable."""
