"""`uld-sdk demo`: the whole job once, with a real model behind a real server on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from uld_adapters.errors import UnknownName, UsageError
from uld_sdk.cli.options import Json
from uld_sdk.cli.output import note, print_json

METHODS = ("uld", "offset")


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder of the report.")] = Path("runs/demo"),
    top_logprobs: Annotated[int, typer.Option("--top-logprobs", min=1, help="Log-probabilities to ask for at each token.")] = 20,
    method: Annotated[str, typer.Option("--method", help="uld, or offset: pairs with an assistant beside them.")] = "uld",
    preset: Annotated[str, typer.Option("--preset", help="Of uld: gated, paper or release.")] = "gated",
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", min=1.0, help="Longest training.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", exists=True, file_okay=False, help="Folder with (forget|retain)_(train|holdout).jsonl of your own topic."),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="A few rows and steps only, to see it run.")] = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the HTML report in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Train an assistant for SmolLM2-135M-Instruct, serve the model by llama.cpp, and answer before and after."""
    from uld_offset_models.recipes import resolve

    resolve(preset=preset, method="uld")  # a wrong one is told at once, not after the model has answered
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    if method == "offset" and preset != "gated":
        raise UsageError("the demo of pairs has presets of its own", hint="leave --preset out")
    note("loading the demo")
    from uld_sdk.demo import run

    report = run(
        output=output,
        top_logprobs=top_logprobs,
        method=method,
        preset=preset,
        max_seconds=max_seconds,
        steps=steps,
        data=data,
        small=small,
        open_report=open_report,
        on_line=note if as_json else print,
    )
    if as_json:
        print_json(report)
