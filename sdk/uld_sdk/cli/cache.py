"""`uld-sdk cache`: the texts of a training in, the large model's log-probabilities of them out, in a folder that training reads."""

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uld_adapters.errors import UsageError
from uld_sdk.cli.options import Json, ServerOptions, spread
from uld_sdk.cli.output import counting, facts, note, print_json, stdout

if TYPE_CHECKING:
    from uld_sdk.caching.asking import Cost

DATA = "Data"
ASKING = "Asking"


@dataclass(frozen=True)
class CacheOptions:
    """Every argument of `uld_sdk.cache` as a flag, but for those of the server."""

    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make, or to go on with.", rich_help_panel=DATA)]
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget", help="Forget set: JSONL, CSV, Parquet, a datasets folder, or owner/name:config:split.", rich_help_panel=DATA
        ),
    ] = None
    retain: Annotated[str | None, typer.Option("--retain", help="Retain set, in the same forms.", rich_help_panel=DATA)] = None
    data: Annotated[list[str] | None, typer.Option("--data", help="Further rows, in the same forms; repeatable.", rich_help_panel=DATA)] = (
        None
    )
    refusals: Annotated[
        str | None,
        typer.Option("--refusals", help="For dpo and relabel: a text file, one a line, or built-in.", rich_help_panel=DATA),
    ] = None
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model to be trained; its template renders the rows.", rich_help_panel=DATA),
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="The training's: it pairs questions and refusals.", rich_help_panel=DATA)] = 0
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="The training's, in tokens a row.", rich_help_panel=DATA)] = 1024
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="Render rows by the template.", rich_help_panel=DATA)
    ] = True
    extend: Annotated[bool, typer.Option("--extend", help="Add to a cache of other data.", rich_help_panel=DATA)] = False
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Texts at a time.", rich_help_panel=ASKING)] = 8

    def chosen(self) -> dict[str, Any]:
        """The flags that were given, named as the arguments of `cache`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@spread
def cache(
    server: ServerOptions,
    options: CacheOptions,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask where a text takes more than one request.", rich_help_panel=ASKING)
    ] = False,
    as_json: Json = False,
) -> None:
    """Score the texts of a training once and keep the log-probabilities; an interrupted run goes on when it is repeated."""
    server.named()
    from uld_sdk.caching.job import cache as run

    with counting("texts") as count:

        def confirmed(cost: "Cost") -> bool:
            with count.paused():
                return _told(cost) if yes else _asked(cost)

        result = run(**server.chosen(), **options.chosen(), confirm=confirmed, on_progress=count)
    if as_json:
        print_json(result.to_dict())
        return
    manifest = result.manifest
    told: dict[str, object] = {
        "cache": str(result.path),
        "target": manifest.target,
        "log-probabilities a token": "all" if manifest.top_logprobs is None else manifest.top_logprobs,
        "texts (scored, kept from before)": f"{result.scored}, {result.texts - result.scored}",
        "tokens scored": result.tokens,
        "requests": result.requests,
        "seconds": result.seconds,
        "bytes": result.bytes,
    }
    stdout().print(facts("", told))


def _told(cost: "Cost") -> bool:
    """Announce what is to come."""
    how = {"forced": "some positions a request", "drafts": "as far as it agrees with a text"}.get(cost.scoring, "")
    note(
        f"the server scores no given text in one request, but {how}: {cost.texts} more texts of {cost.tokens} tokens take about "
        f"{cost.requests} requests, and {_duration(cost.seconds)} if one is asked at a time"
    )
    return True


def _asked(cost: "Cost") -> bool:
    """Announce what is to come, and let the user decide; without a terminal nobody can."""
    _told(cost)
    if not sys.stdin.isatty():
        raise UsageError(f"{cost.requests} requests need your consent, and this is no terminal to give it on", hint="add --yes")
    return typer.confirm("go on?", default=True, err=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
