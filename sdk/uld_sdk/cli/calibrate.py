"""`uld-sdk calibrate`: alpha, margin and filter of an artifact, chosen on hold-out rows and written into its manifest."""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uld_sdk.cli.options import UNLEARNING, Json, ServerOptions, spread
from uld_sdk.cli.output import figures, note, print_json, stdout, working

if TYPE_CHECKING:
    from uld_sdk.calibration.result import CalibrationResult

GRID = "Grid and rule"


@dataclass(frozen=True)
class CalibrationOptions:
    """What `uld_sdk.calibrate` takes beside the server."""

    artifact: Annotated[
        str,
        typer.Option("--artifact", "-a", envvar="ULD_ASSISTANT", help="Folder that `uld-sdk train` made.", rich_help_panel=UNLEARNING),
    ]
    forget_holdout: Annotated[
        str,
        typer.Option(
            "--forget-holdout", help="Questions of the topic that training never saw, with or without answers.", rich_help_panel=UNLEARNING
        ),
    ]
    retain_holdout: Annotated[
        str, typer.Option("--retain-holdout", help="Questions whose answers must stay, likewise.", rich_help_panel=UNLEARNING)
    ]
    apart_from: Annotated[
        list[str] | None,
        typer.Option(
            "--apart-from", help="No hold-out may ask what this asks, such as a test set; repeatable.", rich_help_panel=UNLEARNING
        ),
    ] = None
    assistant_base: Annotated[
        str | None, typer.Option("--assistant-base", help="Where the assistant's base model lies now.", rich_help_panel=UNLEARNING)
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", help="Where the assistant runs: cpu, cuda, auto.", rich_help_panel=UNLEARNING)
    ] = None
    alphas: Annotated[str | None, typer.Option("--alphas", help="Such as 0.5,0.75,1; else 0.25 to 2.", rich_help_panel=GRID)] = None
    margins: Annotated[str | None, typer.Option("--margins", help="Nats, such as 1,3; else 0.5 to 4.", rich_help_panel=GRID)] = None
    filters: Annotated[str | None, typer.Option("--filters", help="Such as 0.01,0.1; else 0.01, of a pair 0.", rich_help_panel=GRID)] = None
    forget_changed: Annotated[
        float, typer.Option("--forget-changed", help="Least share of forget answers that must change.", rich_help_panel=GRID)
    ] = 0.95
    retain_identical: Annotated[
        float, typer.Option("--retain-identical", help="Least share of retain answers that must not.", rich_help_panel=GRID)
    ] = 0.9
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer where a row has none.", rich_help_panel=GRID)
    ] = 64
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at a time.", rich_help_panel=GRID)] = 8
    plot: Annotated[
        Path | None, typer.Option("--plot", help="A .html, .svg or .png file; else calibration.html.", rich_help_panel=GRID)
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Leave the artifact as it is; draw only what --plot names.", rich_help_panel=GRID)
    ] = False

    def chosen(self) -> dict[str, Any]:
        """The arguments of `calibrate`, of the optional ones those that were given."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [])}


@spread
def calibrate(server: ServerOptions, options: CalibrationOptions, as_json: Json = False) -> None:
    """Choose alpha, margin and filter on hold-out rows, scored once; the rule and the values go into the manifest.

    The smallest alpha, then the largest margin, then the smallest filter, that meet --forget-changed and --retain-identical.
    Exit code 1 where none does. Never give the test set of an evaluation.
    """
    server.named()
    from uld_sdk.calibration.job import calibrate as run
    from uld_sdk.calibration.page import verdict

    asked = options.chosen()
    if options.plot is None and not options.dry_run:
        if find_spec("matplotlib") is not None:
            asked["plot"] = Path("calibration.html")
        else:
            note("no plot: pip install 'uld-sdk[report]'")
    with working("calibrating"):
        result = run(asked.pop("artifact"), **asked, on_line=note, **server.chosen())
    if as_json:
        print_json(result.to_dict())
    else:
        stdout().print(trade_off(result))
        print(f"{verdict(result)}\nrule: {result.rule}")
        if result.written:
            print(f"{result.path} has them now")
        if "plot" in asked:
            note(f"plot: {asked['plot']}")
    if result.chosen is None:
        if as_json:
            note(verdict(result))
        raise typer.Exit(1)


def trade_off(result: "CalibrationResult") -> Any:
    """The table of all points; the chosen one (or the nearest) is marked, and the artifact's own until now. One filter needs no column."""
    from uld_sdk.calibration.page import COLUMNS, cell
    from uld_sdk.calibration.sweep import swept

    filters = {point.filter for point in result.points}
    shown = [name for name in COLUMNS if name != "filter" or len(filters) > 1]
    rows = []
    for point in result.points:
        values = point.to_dict()
        marks = ["chosen"] if point == result.chosen else ["nearest"] if result.chosen is None and point == result.nearest else []
        marks += ["until now"] if swept(point) == swept(result.before) else []
        rows.append((*(cell(name, values[name]) for name in shown), "\n".join(marks)))
    return figures((*(COLUMNS[name] for name in shown), ""), rows)
