"""The bar of a training run on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[dict[str, float]], None]


@contextmanager
def progress_bar(*, shown: bool, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """A bar on stderr with losses, the untouched shares and the time left, and the caller's own function."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True)))
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    task = bar.add_task("training", total=None, what="")
    shares: dict[str, float] = {}

    def report(entry: dict[str, float]) -> None:
        shares.update({name: value for name, value in entry.items() if name.endswith("_untouched")})
        words = [f"{entry['left']:.0f} s left", f"remember {entry['remember']:.2f}", f"uniform {entry['uniform']:.3f}"]
        if "retain_untouched" in shares:
            words.append(f"untouched {shares['retain_untouched']:.0%}")
        bar.update(task, total=entry["steps"], completed=entry["step"], what="  ".join(words))
        if on_progress is not None:
            on_progress(entry)

    with bar:
        yield report
