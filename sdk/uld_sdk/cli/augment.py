"""`uld-sdk augment`: a forget set in, a wider one out, and questions that must stay into the retain set."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uld_adapters.errors import UsageError
from uld_sdk.cli.options import Json, ServerOptions, spread
from uld_sdk.cli.output import counting, facts, print_json, stdout, table

if TYPE_CHECKING:
    from uld_sdk.augmentation.wanted import AugmentResult

DATA = "Data"
TEXTS = "Texts"
ASKING = "Asking"


@dataclass(frozen=True)
class AugmentOptions:
    """Every argument of `uld_sdk.augment` as a flag, but for those of the server."""

    forget: Annotated[
        str,
        typer.Option(
            "--forget", help="Forget set: JSONL, CSV, Parquet, a datasets folder, or owner/name:config:split.", rich_help_panel=DATA
        ),
    ]
    output: Annotated[str, typer.Option("--output", "-o", help="JSONL file to write the wider forget set to.", rich_help_panel=DATA)]
    retain: Annotated[
        str | None, typer.Option("--retain", help="Retain set, in the same forms; its questions do not come again.", rich_help_panel=DATA)
    ] = None
    retain_out: Annotated[
        str | None, typer.Option("--retain-out", help="JSONL file for the retain set with the neighbours.", rich_help_panel=DATA)
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.", rich_help_panel=DATA)] = False
    paraphrases: Annotated[
        int | None,
        typer.Option("--paraphrases", min=0, help="Paraphrases of question and of answer a row, 2 if not said.", rich_help_panel=TEXTS),
    ] = None
    no_paraphrases: Annotated[
        bool, typer.Option("--no-paraphrases", help="None, nor those of the input: D_f in place of D'_f.", rich_help_panel=TEXTS)
    ] = False
    wrong: Annotated[int | None, typer.Option("--wrong", min=0, help="Wrong answers a row, 2 if not said.", rich_help_panel=TEXTS)] = None
    no_wrong: Annotated[
        bool, typer.Option("--no-wrong", help="None, nor those of the input: D_r in place of D'_r.", rich_help_panel=TEXTS)
    ] = False
    neighbours: Annotated[
        int | None,
        typer.Option("--neighbours", min=0, help="Questions that must stay a row, 1 with --retain-out.", rich_help_panel=TEXTS),
    ] = None
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="By rules from the set itself, without a server; neighbours are then about words and figures only.",
            rich_help_panel=ASKING,
        ),
    ] = False
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the rules, and of what is asked again.", rich_help_panel=ASKING)] = 0
    tries: Annotated[int, typer.Option("--tries", min=1, help="For what a check refuses; then it is left out.", rich_help_panel=ASKING)] = 3
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Of all tries but the first, which is greedy.", rich_help_panel=ASKING)
    ] = 0.8
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest reply.", rich_help_panel=ASKING)] = 256
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at a time.", rich_help_panel=ASKING)] = 8
    cache: Annotated[
        str | None, typer.Option("--cache", help="File of the replies; else the output's name and .cache.", rich_help_panel=ASKING)
    ] = None

    def chosen(self) -> dict[str, Any]:
        """The flags that were given, named as the arguments of `augment`."""
        given = {name: value for name, value in asdict(self).items() if value is not None and name not in {"no_paraphrases", "no_wrong"}}
        for name, none in (("paraphrases", self.no_paraphrases), ("wrong", self.no_wrong)):
            if none and given.get(name):
                raise UsageError(f"--{name} {given[name]} and --no-{name} contradict each other", hint="give one of them")
            if none:
                given[name] = 0
        return given


@spread
def augment(server: ServerOptions, options: AugmentOptions, as_json: Json = False) -> None:
    """Widen a forget set with paraphrases, wrong answers and questions that must stay."""
    given = options.chosen()
    from uld_sdk.augmentation.job import augment as run

    with counting("replies") as count:
        result = run(**server.chosen(), **given, on_progress=count)
    if as_json:
        print_json(result.to_dict())
        return
    stdout().print(_summary(result))
    stdout().print(facts("", _facts(result)))


def _summary(result: "AugmentResult") -> Any:
    rows = [
        (kind.replace("_", " "), count.wanted, count.kept, count.left_out, [f"{reason}: {n}" for reason, n in count.refused.items()])
        for kind, count in result.counts.items()
    ]
    return table("", ("", "wanted", "kept", "left out", "refused by a check"), rows)


def _facts(result: "AugmentResult") -> dict[str, object]:
    told: dict[str, object] = {"forget set": str(result.path), "rows": result.rows}
    if result.retain_path is not None:
        told |= {"retain set": str(result.retain_path), "its rows": result.retain_rows}
    told |= {"texts and conversations, as they were": result.as_they_were, "duplicate rows left out": result.duplicates}
    return {**told, "replies (asked for, from the cache)": f"{result.asked}, {result.cached}", "seconds": result.seconds}
