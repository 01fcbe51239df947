"""`uld-sdk emulate`: a local model behind the dialect and the limits of a real server."""

from typing import Annotated, Any

import typer

from uld_sdk.cli.options import Json
from uld_sdk.cli.output import note, print_json


def emulate(
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="A causal model: folder, GGUF file or hub name.")],
    dialect: Annotated[str, typer.Option("--dialect", "-d", help="tgi, vllm or openai.")] = "tgi",
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.")] = 8080,
    max_top_n_tokens: Annotated[int, typer.Option("--max-top-n-tokens", min=0, help="TGI's cap on log-probabilities.")] = 5,
    max_logprobs: Annotated[int, typer.Option("--max-logprobs", min=-1, help="Cap of vllm and openai; -1 is none.")] = 20,
    prefill: Annotated[
        str, typer.Option("--prefill", help="With openai, what continues a last message: none, plain, continue_final_message, prefix.")
    ] = "none",
    max_total_tokens: Annotated[
        int | None, typer.Option("--max-total-tokens", min=2, help="Prompt and answer together; without it the model's context.")
    ] = None,
    round_trip: Annotated[float, typer.Option("--round-trip", min=0.0, help="Seconds added to each request.")] = 0.0,
    seconds_per_token: Annotated[float, typer.Option("--seconds-per-token", min=0.0, help="Seconds added to each token.")] = 0.0,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="ULD_API_KEY", help="Ask clients for this key.")] = None,
    as_json: Json = False,
) -> None:
    """Serve a local model as TGI, vLLM or the OpenAI API would, for tests and benchmarks without a GPU; Ctrl-C ends it."""
    note(f"loading {model}")
    from uld_adapters import emulator

    def ready(url: str) -> None:
        if as_json:
            print_json({"url": url, "dialect": dialect, "model": model})
        else:
            print(f"{dialect} emulator of {model} at {url}", flush=True)

    options: dict[str, Any] = {"max_top_n_tokens": max_top_n_tokens, "max_logprobs": max_logprobs, "max_total_tokens": max_total_tokens}
    options |= {"round_trip": round_trip, "seconds_per_token": seconds_per_token, "api_key": api_key, "prefill": prefill}
    emulator.serve(model, dialect=dialect, host=host, port=port, on_ready=ready, **options)
