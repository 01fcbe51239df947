"""The command line `uld-sdk`: one module a command, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 the work failed, 2 the command is wrong, 130 interrupted. Answers go to stdout, all else to stderr.
"""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from uld_adapters.errors import UldError
from uld_sdk import __version__
from uld_sdk.cli import align, augment, cache, calibrate, chat, demo, emulate, generate, inspect, train


class Commands(TyperGroup):
    """The group of commands, which turns what they raise into a message on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; with --debug its exceptions pass through with their traceback."""
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = lambda message, *_: _complain(f"warning: {message}")
                return super().invoke(ctx)
        except UldError as error:
            _complain(f"error: {error}", *getattr(error, "__notes__", ()))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            _complain("interrupted", *getattr(interrupt, "__notes__", ()))
            raise typer.Exit(130) from interrupt
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing is left to flush
            raise typer.Exit(1) from error
        except OSError as error:
            _complain(f"error: {error}")
            raise typer.Exit(1) from error


def _complain(*lines: str) -> None:
    """Write lines to stderr as they are: a message may hold brackets, which rich would take for markup."""
    for line in lines:
        print(line, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"uld-sdk {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    name="uld-sdk",
    help="Make a language model behind a server forget: train a small assistant, and answer through it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="ULD_DEBUG", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command; both act where they are declared."""


COMMANDS: dict[str, Callable[..., None]] = {
    "augment": augment.augment,
    "cache": cache.cache,
    "train": train.train,
    "calibrate": calibrate.calibrate,
    "generate": generate.generate,
    "chat": chat.chat,
    "inspect": inspect.inspect,
    "align": align.align,
    "emulate": emulate.emulate,
    "demo": demo.demo,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point of the script `uld-sdk`; ends the process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar for each loaded file would drown the answers
    app()
