"""What a server that cannot go on from a given answer leaves possible."""

from uld_adapters.backend import Capabilities
from uld_adapters.errors import ContinuationUnavailable, UsageError
from uld_sdk.verify import Mode


def check_continuing(capabilities: Capabilities, mode: Mode, draft: str | int) -> None:
    """Raise `UsageError` for an answer that would have to be continued at almost every token."""
    if capabilities.continues:
        return
    if mode is Mode.MATCH:
        raise UsageError(
            "this server cannot continue an answer, so that it has to draw the tokens itself",
            hint=f"leave seed out, and all options but {', '.join(sorted(capabilities.sampling))}",
        )
    if draft != "stream":
        raise UsageError(f"this server cannot continue an answer, and draft={draft!r} asks for it in parts", hint='use draft="stream"')


def cannot_go_on() -> ContinuationUnavailable:
    """The error for an answer that the assistant changed, on a server that goes on from its own answers only."""
    return ContinuationUnavailable(
        "the assistant changes this answer, and the server cannot go on from the changed one",
        hint="refuse such answers (on_touched='refuse'), or use a server that continues answers; with openai try route='completions'",
    )
