"""`uld-sdk generate`: one answer, or many from a JSONL file."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from uld_adapters.errors import DataError, UsageError
from uld_sdk.cli.options import ClientOptions, Json, SamplingOptions, spread
from uld_sdk.cli.output import facts, note, print_json, print_stream, report_facts, stderr, stdout, table, trace_table, working


@spread
def generate(
    client: ClientOptions,
    sampling: SamplingOptions,
    prompt: Annotated[str | None, typer.Argument(help="The question; - reads it from stdin.", show_default=False)] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", exists=True, dir_okay=False, help='JSONL: "text", {"prompt"} or {"messages"} a line.')
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at a time with --input.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Show what happened at each token.")] = False,
    as_json: Json = False,
) -> None:
    """Answer through the server as if the forget set had never been learned."""
    if (prompt is None) == (input is None):
        raise UsageError("give a prompt or --input, one of them", hint="uld-sdk generate 'a question' ... or --input prompts.jsonl")
    if not client.assistant:
        note("no --assistant: these are the plain answers of the server")
    settings = {**sampling.chosen(), "raw": raw}
    if input is not None:
        prompts = read_prompts(input)
        with working(f"{len(prompts)} prompts"), client.open(trace=trace) as opened:
            results = opened.generate_many(prompts, concurrency=concurrency, **settings)
        if as_json:
            print_json({"results": [{"prompt": asked, **result.to_dict()} for asked, result in zip(prompts, results, strict=True)]})
            return
        rows = [
            (shown(asked), result.text, result.untouched, result.report.changed, result.report.requests)
            for asked, result in zip(prompts, results, strict=True)
        ]
        stdout().print(table("", ("prompt", "answer", "untouched", "changed", "requests"), rows))
        return

    text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise UsageError("the prompt is empty", hint="give a question, or pipe one in with -")
    with client.open(trace=trace) as opened:
        if as_json:
            with working("answering"):
                result = opened.generate(text, **settings)
            print_json({"prompt": text, **result.to_dict()})
            return
        result = print_stream(opened.stream(text, **settings), live=client.live)
    stderr().print(facts("", report_facts(result)))
    if trace:
        stderr().print(trace_table(result))


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a JSONL file: a string, or an object with `prompt` or `question` (text) or `messages` (a conversation) a line."""
    from uld_offset_models.sources import read_text

    prompts: list[Any] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not splitlines: JSON strings may hold other separators
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})", hint="write one JSON value a line") from error
        if isinstance(row, dict):
            row = next((row[key] for key in ("prompt", "question", "messages") if key in row), None)
        if not (isinstance(row, str) and row.strip()) and not (isinstance(row, list) and row):
            raise DataError(f"{where}: no prompt", hint='a line is "text", {"prompt": "text"} or {"messages": [...]}')
        prompts.append(row)
    if not prompts:
        raise DataError(f"{path} holds no prompts", hint="write one JSON value a line")
    return prompts


def shown(prompt: Any) -> str:
    """A prompt as one cell of a table: of a conversation its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
