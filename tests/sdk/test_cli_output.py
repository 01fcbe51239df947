"""What the terminal shows: figures whole in narrow windows, and nothing that moves the cursor."""

import io
import sys

import pytest
from rich.console import Console

from uld_sdk.calibration.page import COLUMNS, cell
from uld_sdk.cli.output import figures, print_stream, working
from uld_sdk.result import Piece, Report, Result, Usage


def test_figures_stay_whole_in_80_columns() -> None:
    values = {name: 1.0 if name.startswith("forget") else 0.0192 for name in COLUMNS} | {"forget_drop": 12.345, "retain_change": -0.0192}
    shown = [name for name in COLUMNS if name != "filter"]
    cells = [cell(name, values[name]) for name in shown]
    out = Console(file=io.StringIO(), width=80)
    out.print(figures((*(COLUMNS[name] for name in shown), ""), [(*cells, "chosen\nuntil now")]))
    text = out.file.getvalue()
    assert "…" not in text
    assert all(figure in text for figure in cells)
    assert {"12.35", "-0.02"} <= set(cells)


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\\x1b[2J\\rb\n\tc é\n"), (False, "a\x1b[2J\rb\n\tc é\n")])
@pytest.mark.parametrize("live", [True, False])
def test_an_answer_moves_no_cursor(terminal: bool, shown: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO(newline="")
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    answer = "a\x1b[2J\rb\n\tc é"
    result = Result(answer, (1,), "stop", Usage(1, 1), Report())
    print_stream([Piece(answer, (1,)), Piece("", (), "stop", result)], live=live)
    assert out.getvalue() == shown


def test_work_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with working("answering"):
        pass
    assert capsys.readouterr().err == ""
