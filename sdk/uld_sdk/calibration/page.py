"""The plot of a calibration as a file: a page with the table beneath it, or the picture alone."""

from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from uld_adapters.errors import SaveFailed, UsageError
from uld_sdk.calibration.sweep import SWEPT
from uld_sdk.evaluation import plots

if TYPE_CHECKING:
    from uld_sdk.calibration.result import CalibrationResult

SUFFIXES = (".html", ".svg", ".png")
COLUMNS = {
    "alpha": "alpha",
    "margin": "margin (nats)",
    "filter": "filter",
    "forget_changed": "forget changed",
    "forget_tokens_changed": "tokens changed",
    "forget_drop": "drop (nats)",
    "retain_identical": "retain identical",
    "retain_untouched": "untouched",
    "retain_change": "change (nats)",
    "exact": "exact",
}
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Calibration of $name</title>
<style>
body { margin: 0 auto; max-width: 1080px; padding: 40px 24px 80px; color: #1f2933; font: 15px/1.55 system-ui, "DejaVu Sans", sans-serif; }
img { width: 100%; } p { max-width: 76ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 5px 10px; border-bottom: 1px solid #e4e7eb; }
.chosen { background: #ccfbf1; font-weight: 600; } .nearest { background: #ffedd5; }
</style>
</head>
<body>
<h1>Calibration of $name</h1>
<p>$said</p>
<p>Rule: $rule.</p>
<p>$rows; $target, $k log-probabilities a token.</p>
<img src="$plot" alt="Forget answers changed and retain answers identical, by alpha and margin">
<table><thead><tr>$heads</tr></thead><tbody>$lines</tbody></table>
</body>
</html>
""")


def check_plot(path: Path) -> None:
    """Refuse what cannot be drawn before anything is asked; raises `UsageError` and `MissingExtra`."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path} has no suffix of a plot", hint=f"use one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise UsageError(f"--plot {path} is a folder", hint="name a file in it")
    plots.need_matplotlib()


def verdict(result: "CalibrationResult") -> str:
    """What came of the sweep, in a sentence."""
    point = result.chosen or result.nearest
    values = f"alpha {point.alpha:g}, margin {point.margin:g}, filter {point.filter:g}"
    shares = f"{point.forget_changed:.1%} of the forget answers changed, {point.retain_identical:.1%} of the retain answers identical"
    if result.chosen is None:
        return f"nothing meets both thresholds, and nothing was changed; the nearest is {values}: {shares}"
    return f"chosen: {values}: {shares}"


def cell(name: str, value: float | None) -> str:
    """A figure in a table: settings as they are, shares and nats to a hundredth."""
    return "-" if value is None else f"{value:g}" if name in SWEPT else f"{value:.2f}"


def write_plot(path: Path, result: "CalibrationResult") -> None:
    """Draw a result into a .html, .svg or .png file; raises `SaveFailed`."""
    kind = path.suffix.lower().removeprefix(".")
    figure = plots.trade_off([point.to_dict() for point in result.points], (result.chosen or result.nearest).to_dict(), result.thresholds)
    content = _page(result, plots.uri(figure)).encode() if kind == "html" else plots.picture(figure, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise SaveFailed(f"{path} could not be written: {error.strerror}", hint="choose another --plot") from error


def _page(result: "CalibrationResult", plot: str) -> str:
    lines = []
    for point in result.points:
        state = "chosen" if point == result.chosen else "nearest" if result.chosen is None and point == result.nearest else ""
        values = point.to_dict()
        lines.append(f'<tr class="{state}">' + "".join(f"<td>{cell(name, values[name])}</td>" for name in COLUMNS) + "</tr>")
    return _PAGE.substitute(
        name=escape(result.path.name),
        said=escape(verdict(result)),
        rule=escape(result.rule),
        rows=escape(" and ".join(f"{count} {kind}" for kind, count in result.rows.items()) + " hold-out rows"),
        target=escape(result.target),
        k="all" if result.top_logprobs is None else result.top_logprobs,
        plot=plot,
        heads="".join(f"<th>{escape(name)}</th>" for name in COLUMNS.values()),
        lines="".join(lines),
    )
