"""Which kind of server answers at an address, and the error for a backend that is not its kind."""

from uld_adapters.errors import (
    BackendError,
    LogprobsUnavailable,
    MalformedAnswer,
    ModelNotFound,
    RequestRejected,
    TokenizerMismatch,
    UldError,
)
from uld_adapters.http import HttpClient

OPENAI = "openai"  # what the other kinds speak, too
# By backend: what its server is called, a route of it, and a field of the answer there.
MARKS = {
    "tgi": ("a TGI server", "/info", "model_id"),
    "vllm": ("a vLLM server", "/version", "version"),
    "llamacpp": ("a llama.cpp server", "/props", "default_generation_settings"),
    OPENAI: ("a server of the OpenAI kind", "/v1/models", "data"),
}
# How a first talk ends with a server that understands some requests and means something else by them.
_AT_ODDS = (RequestRejected, MalformedAnswer, TokenizerMismatch, LogprobsUnavailable)


async def backend_for(http: HttpClient) -> str | None:
    """The backend whose server answers at the address, by the routes that no other kind has; None where none of them is known."""
    for name, (_, route, field) in MARKS.items():
        try:
            answer = await http.request("GET", route, patient=False)
        except UldError:
            continue
        if isinstance(answer, dict) and field in answer:
            return name
    return None


async def wrong_backend(http: HttpClient, name: str, error: UldError) -> BackendError | None:
    """The error that takes the place of a failed first talk with a server of another kind than `name`; None where it is of that kind."""
    missing = isinstance(error, ModelNotFound) and error.missing_route
    if not missing and (name == OPENAI or not isinstance(error, _AT_ODDS)):
        return None
    found = await backend_for(http)
    if found == name or (not missing and (found is None or (found == OPENAI and not isinstance(error, RequestRejected)))):
        return None
    kind = MARKS[name][0] if name in MARKS else f"a server for the {name} backend"
    hint = "check --backend and --base-url" if found is None else f"it looks like {MARKS[found][0]}: backend={found!r} (--backend {found})"
    status, request_id = (error.status, error.request_id) if isinstance(error, BackendError) else (None, None)
    return (ModelNotFound if missing else RequestRejected)(
        f"{http.base_url} does not look like {kind}: {error.message}", hint=hint, status=status, request_id=request_id
    )
