"""`uld-sdk chat`: a conversation in the terminal, each answer verified as it streams in."""

import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from uld_adapters.errors import BackendError
from uld_sdk.cli.options import ClientOptions, Json, SamplingOptions, spread
from uld_sdk.cli.output import note, print_json, print_stream

if TYPE_CHECKING:
    from uld_sdk.result import Result

HELP = "/exit ends, /reset starts anew, /help shows this"


@spread
def chat(
    client: ClientOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option("--system", help="A first message that sets the tone.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to the server through the assistant; with --json the conversation is printed when it ends."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    results: list[Result] = []
    interactive = sys.stdin.isatty()
    if not client.assistant:
        note("no --assistant: this is the plain server")
    with client.open() as opened:
        if interactive:
            note(HELP)
        while True:
            line = read_line(interactive, "" if as_json else "> ")
            if line is None or line in ("/exit", "/quit"):
                break
            if line == "/reset":
                messages = list(opening)
                note("a new conversation")
            elif line.startswith("/"):
                note(HELP)
            elif line:
                try:
                    asked = [*messages, {"role": "user", "content": line}]
                    if as_json:
                        result = opened.chat(asked, **sampling.chosen())
                    else:
                        result = print_stream(opened.stream(asked, **sampling.chosen()), live=client.live)
                        note(summary(result))
                except BackendError as error:
                    if not interactive:
                        raise
                    note(f"error: {error}")
                    continue
                except KeyboardInterrupt:
                    if not interactive:
                        raise
                    note("\ninterrupted; the conversation goes on before that question")
                    continue
                messages = [*asked, {"role": "assistant", "content": result.text}]
                results.append(result)
    if as_json:
        print_json({"messages": messages, "results": [result.to_dict() for result in results]})


def read_line(interactive: bool, prompt: str) -> str | None:
    """The next line that the user typed, None at the end of input; on a terminal with history and editing."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    with suppress(ImportError):  # not on every platform
        import_module("readline")
    try:
        return input(prompt).strip()
    except EOFError:
        note("")
        return None


def summary(result: "Result") -> str:
    """One line on what the assistant did to an answer."""
    report = result.report
    word = "untouched" if result.untouched else f"{report.changed} of {report.positions} tokens changed"
    return f"  [{word}, {report.requests} requests, {report.seconds_total:.1f} s]"
