"""The side-by-side table that the demo prints."""

import io
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uld_sdk.evaluation.answers import Answered


def side_by_side_table(rows: Sequence[Answered], *, forget: int = 3, retain: int = 4) -> str:
    """A few held-out answers before and after, near neighbours of the topic first; tokens that changed stand out."""
    held_out = [row for row in rows if row.part == "holdout"]
    near, general = ([row for row in held_out if row.kind == "retain" and row.neighbour is flag] for flag in (True, False))
    chosen = [row for row in held_out if row.kind == "forget"][:forget] + near[: retain - 1] + general[:1]
    table = Table(title="Held-out questions, before and after", show_lines=True, expand=True)
    for name, ratio in (("", 1), ("question", 3), ("before", 6), ("after", 6)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row in chosen:
        verdict = "identical" if row.identical else f"{row.changed} of {row.positions} tokens changed"
        style = "red" if row.kind == "forget" else "green"
        table.add_row(Text(row.kind, style=style), Text(f"{row.question}\n\n{verdict}"), Text(row.before), _after(row))
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 80), 160)
    console = Console(
        file=io.StringIO(), width=width, force_terminal=sys.stdout.isatty(), color_system="standard" if sys.stdout.isatty() else None
    )
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _after(row: Answered) -> Text:
    if not row.steps or row.identical:
        return Text(row.after)
    text = Text()
    for step in row.steps:
        text.append(step.text, style="bold red" if step.changed else "")
    return text
