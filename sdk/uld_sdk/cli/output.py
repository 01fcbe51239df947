"""What commands print: JSON and tables on stdout, progress and reports on stderr."""

import json
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import StreamInterrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from uld_sdk.result import Piece, Result


def stdout() -> "Console":
    """A rich console on stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def stderr() -> "Console":
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2), flush=True)


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner with the time that went by, on stderr and only on a terminal."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = stderr()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield


class Counter:
    """A bar that is told how many of how many are done."""

    def __init__(self, bar: "Progress", task: "TaskID") -> None:
        self._bar, self._task = bar, task

    def __call__(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, total=total)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away while something else is said or asked."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()


@contextmanager
def counting(what: str) -> Iterator[Counter]:
    """A bar on stderr, only on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Counter(bar, bar.add_task("", total=None))


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> "Table":
    """A rich table of plain text; numbers and names are not taken for markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(_shown(cell)) for cell in row))
    return made


def figures(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> "Table":
    """A table of many narrow columns: headings fold at their words, figures never."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    for column in columns:
        made.add_column(column.replace(" ", "\n"), no_wrap=True, vertical="bottom")
    for row in rows:
        made.add_row(*row)
    return made


def facts(title: str, values: dict[str, object]) -> "Table":
    """A table of two columns without a header: what, and how much."""
    made = table(title, ("", ""), values.items())
    made.show_header = False
    return made


def _shown(value: object) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def print_stream(pieces: "Iterable[Piece]", *, live: bool) -> "Result":
    """Write an answer to stdout, piece by piece if `live`, else at its end: a refusal takes back what came before it.

    On a terminal control characters show as escapes: no answer moves the cursor.
    """
    plain = _visible if sys.stdout.isatty() else str
    result = None
    for piece in pieces:
        result = piece.result or result
        if live:
            sys.stdout.write(plain(piece.text))
            sys.stdout.flush()
    if result is None:
        raise StreamInterrupted("the answer ended without a result", hint="ask again")
    print("" if live else plain(result.text), flush=True)
    return result


def _visible(text: str) -> str:
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def report_facts(result: "Result") -> dict[str, object]:
    """The report of one answer in words."""
    report = result.report
    return {
        "finish reason": result.finish_reason,
        "tokens (prompt, answer)": f"{result.usage.prompt_tokens}, {result.usage.completion_tokens}",
        "requests": report.requests,
        "drafted, accepted": f"{report.drafted}, {report.accepted}",
        "untouched positions": f"{report.untouched} of {report.positions}",
        "changed by the assistant": report.changed,
        **({f"touched by {name}": count for name, count in report.touched_by.items()} if len(report.touched_by) > 1 else {}),
        "exact positions": f"{report.exact} of {report.positions}",
        "largest bound": report.largest_bound,
        "log-probabilities a token": "all" if report.top_logprobs is None else report.top_logprobs,
        "seconds (server, small model, total)": f"{report.seconds_server:.2f}, {report.seconds_small:.2f}, {report.seconds_total:.2f}",
        "mode": report.mode,
        "tokens compared by": report.alignment,
        "the answer is the model's own": _whose(result),
    }


def _whose(result: "Result") -> str:
    report = result.report
    if not result.untouched:
        return "no"
    drawn = report.mode == "match" and report.accepted < report.positions
    return "drawn here from its own probabilities alone, with the seed" if drawn else "yes"


def trace_table(result: "Result") -> "Table":
    """Token by token: what the server drafted, what stands, and what the gate said."""
    rows = [
        (index, repr(step.text), repr(step.remote_text) if step.changed else "", step.gate, step.peak, step.touched, step.exact)
        for index, step in enumerate(result.report.trace)
    ]
    return table("token by token", ("", "token", "instead of", "gate", "peak (nats)", "touched", "exact"), rows)
