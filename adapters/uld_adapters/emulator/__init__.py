"""A local model behind the HTTP dialect of TGI, vLLM or the OpenAI API, with the limits of the real servers.

`build_app` makes the ASGI application, `EmulatorServer` runs it in a thread, `serve` runs it until it is stopped. Needs the
extra `serve`; nothing heavy is imported before one of them is called.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from uld_adapters.emulator.server import EmulatorServer

__all__ = ["DIALECTS", "EmulatorServer", "build_app", "serve"]

DIALECTS = ("tgi", "vllm", "openai")
PREFILLS = ("none", "plain", "continue_final_message", "prefix")


def build_app(
    model: Any,
    *,
    dialect: str = "tgi",
    tokenizer: Any = None,
    model_id: str | None = None,
    max_top_n_tokens: int = 5,
    max_logprobs: int = 20,
    max_total_tokens: int | None = None,
    round_trip: float = 0.0,
    seconds_per_token: float = 0.0,
    memo: bool = True,
    api_key: str | None = None,
    logprobs: bool = True,
    seed: int | None = None,
    prefill: str = "none",
    token_bytes: bool = True,
    token_prompts: bool = True,
) -> "Starlette":
    """The ASGI application that answers for a model (a folder, a GGUF file, a hub name, a transformers model, or an Engine).

    `max_top_n_tokens` is TGI's cap on k and `max_logprobs` that of the others (-1: none; completions of the OpenAI API give 5 at
    most); `max_total_tokens` counts prompt and answer (default: the model's context). `round_trip` and `seconds_per_token` are the
    latency model, in seconds. `memo` keeps what the model said, so that a repeated request needs no model. `logprobs=False` plays
    a server that ignores the wish for log-probabilities. `seed` is for sampling requests that name none (default: a new one each
    time). Counters are in `app.state.stats`.

    With the dialect `openai`, `prefill` says how a conversation's last message is continued: not at all (`none`, as the API itself),
    always (`plain`: llama.cpp), by the request's `continue_final_message` (vLLM) or by the message's `prefix` (Mistral, DeepSeek).
    `token_bytes=False` plays a server that tells half a character as U+FFFD only, `token_prompts=False` one that takes no ids.
    """
    from uld_adapters.errors import MissingExtra, UnknownName

    try:
        from uld_adapters.emulator.app import assemble
        from uld_adapters.emulator.desk import Limits
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "starlette", "serve") from error
    from uld_adapters.emulator.engine import Engine

    if dialect not in DIALECTS:
        raise UnknownName("dialect", dialect, DIALECTS)
    if prefill not in PREFILLS:
        raise UnknownName("prefill", prefill, PREFILLS)
    engine = model if isinstance(model, Engine) else Engine.load(model, tokenizer=tokenizer, memo=memo)
    limits = Limits(
        model_id=model_id or engine.name,
        max_top=max_top_n_tokens if dialect == "tgi" else max_logprobs,
        max_total_tokens=max_total_tokens or engine.context,
        seconds_per_token=seconds_per_token,
        logprobs=logprobs,
        seed=seed,
        prefill=prefill,
        token_bytes=token_bytes,
        token_prompts=token_prompts,
    )
    return assemble(engine, limits, dialect=dialect, round_trip=round_trip, api_key=api_key)


def serve(
    model: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    log_level: str = "warning",
    on_ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve a model until Ctrl-C; port 0 takes a free one, `on_ready` is told the address, the rest goes to `build_app`."""
    app = build_app(model, **options)
    from uld_adapters.emulator.server import run

    run(app, host=host, port=port, log_level=log_level, on_ready=on_ready)


def __getattr__(name: str) -> Any:
    if name == "EmulatorServer":
        from uld_adapters.errors import MissingExtra

        try:
            from uld_adapters.emulator.server import EmulatorServer
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "uvicorn", "serve") from error
        return EmulatorServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
