"""The bar of a training run on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOSSES = {"remember": ".2f", "uniform": ".3f", "forget": ".3f", "retain": ".3f"}  # of an assistant, of method direct
_FIGURES = ("retain_untouched", "forget_nll", "retain_nll")
OnProgress = Callable[[dict[str, float]], None]


@contextmanager
def progress_bar(*, shown: bool, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """A bar on stderr with losses, what is measured now and then, and the time left; and the caller's own function."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True)))
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    task = bar.add_task("training", total=None, what="")
    figures: dict[str, float] = {}

    def report(entry: dict[str, float]) -> None:
        figures.update({name: entry[name] for name in _FIGURES if name in entry})
        words = [f"{entry['left']:.0f} s left", *(f"{name} {entry[name]:{form}}" for name, form in _LOSSES.items() if name in entry)]
        if "retain_untouched" in figures:
            words.append(f"untouched {figures['retain_untouched']:.0%}")
        words += [f"{name.replace('_nll', ' NLL')} {value:.2f}" for name, value in figures.items() if name.endswith("_nll")]
        bar.update(task, total=entry["steps"], completed=entry["step"], what="  ".join(words))
        if on_progress is not None:
            on_progress(entry)

    with bar:
        yield report
