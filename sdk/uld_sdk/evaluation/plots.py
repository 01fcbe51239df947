"""The reports' plots, each as one self-contained SVG data URI or, for a file of its own, as a figure."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from uld_adapters.errors import MissingExtra

INK, GRID, FORGET, RETAIN, ACCENT = "#1f2933", "#e4e7eb", "#c2410c", "#0f766e", "#4c51bf"


def need_matplotlib() -> Any:
    """The library itself; raises `MissingExtra` where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "report") from error
    return matplotlib


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    matplotlib = need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "uld-sdk"
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(**grid)
    for axis in figure.axes:
        _plain(axis)
    return figure, axes


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9aa5b1")
    axis.tick_params(colors=INK, labelsize=9)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def picture(figure: Any, kind: str) -> bytes:
    """A figure as the content of an svg or png file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **({"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}))
    return buffer.getvalue()


def uri(figure: Any) -> str:
    """A figure as one self-contained SVG data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture(figure, "svg")).decode("ascii")


def rouge_bars(report: dict[str, Any], *, goal: float) -> str:
    """ROUGE-L recall of the answers after against those before, by set and part; `goal` is what forgotten answers may keep of it."""
    figure, axis = _figure(5.2, 3.0)
    for offset, part, alpha in ((-0.19, "train", 0.45), (0.19, "holdout", 1.0)):
        for place, (kind, colour) in enumerate((("forget", FORGET), ("retain", RETAIN))):
            value = report[f"{kind}_rouge"].get(part)
            if value is None:
                continue
            axis.bar(place + offset, value, 0.36, color=colour, alpha=alpha)
            name = "held out" if part == "holdout" else "trained"
            axis.text(place + offset, value + 0.02, f"{value:.2f}\n{name}", ha="center", va="bottom", fontsize=9, color=INK)
    axis.axhline(goal, color=FORGET, linewidth=0.9, linestyle=":")
    axis.axhline(0.95, color=RETAIN, linewidth=0.9, linestyle=":")
    axis.set_xticks([0, 1], ["forget (lower is better)", "retain (higher is better)"])
    axis.set_ylim(0, 1.24)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.set_ylabel("ROUGE-L recall", fontsize=9)
    return uri(figure)


_LOSSES = (
    ("remember", FORGET, "remember (NLL, forget set)"),
    ("uniform", RETAIN, "uniform (KL, retain set)"),
    ("forget", FORGET, "forget objective"),
    ("retain", RETAIN, "retain objective"),
)


def training_curves(history: Sequence[dict[str, float]]) -> str:
    """Losses by optimiser step, and the share of the retain hold-out that stays untouched where it was measured."""
    figure, axis = _figure(5.2, 3.0)
    for name, colour, label in _LOSSES:
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel("nats a token", fontsize=9)
    shares = [(row["step"], row["retain_untouched"]) for row in history if row.get("retain_untouched") is not None]
    lines, labels = axis.get_legend_handles_labels()
    if shares:
        right = axis.twinx()
        _plain(right)
        right.grid(False)
        right.plot(*zip(*shares, strict=True), color=ACCENT, marker="o", markersize=3, linewidth=1.2, label="retain hold-out untouched")
        right.set_ylim(0, 1.05)
        more, names = right.get_legend_handles_labels()
        lines, labels = lines + more, labels + names
    axis.legend(lines, labels, fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)
    return uri(figure)


def gate_along(rows: Sequence[dict[str, Any]], margin: float) -> str:
    """Gate c (line, 0 to 1) and peak in nats (bars; see `TokenStep`) at each token of a few answers, one panel each."""
    figure, panels = _figure(10.6, 2.5 * len(rows), nrows=len(rows), squeeze=False)
    for (axis,), row in zip(panels, rows, strict=True):
        steps = row["steps"]
        colour = FORGET if row["kind"] == "forget" else RETAIN
        places = range(len(steps))
        axis.bar(places, [step["peak"] for step in steps], color=colour, alpha=0.35, width=0.8)
        axis.axhline(margin, color=INK, linewidth=0.9, linestyle="--")
        axis.set_ylim(0, max(12.0, *(step["peak"] for step in steps)) if steps else 12)
        axis.set_ylabel("peak (nats)", fontsize=9)
        axis.set_xticks(places, [_label(step["text"]) for step in steps], rotation=60, ha="right", fontsize=7)
        axis.set_xlim(-0.7, len(steps) - 0.3)
        axis.set_title(f"{row['kind']}: {row['question']}", fontsize=10, loc="left", color=INK)
        if any(step["gate"] is not None for step in steps):
            right = axis.twinx()
            _plain(right)
            right.grid(False)
            right.plot(places, [step["gate"] for step in steps], color=ACCENT, marker=".", linewidth=1.2)
            right.set_ylim(0, 1.05)
            right.set_ylabel("gate c", fontsize=9, color=ACCENT)
    return uri(figure)


def _label(text: str) -> str:
    return (text.replace("\n", "↵").strip() or "␣").replace("$", r"\$")


def requests_and_latency(rows: Sequence[dict[str, Any]]) -> str:
    """Left: requests an answer took. Right: seconds of each answer against the plain remote's on the same prompt."""
    figure, (left, right) = _figure(10.6, 3.0, ncols=2)
    kinds = (("forget", FORGET), ("retain", RETAIN))
    most = max((row["requests"] for row in rows), default=1)
    counts = [[row["requests"] for row in rows if row["kind"] == kind] for kind, _ in kinds]
    left.hist(
        counts,
        bins=[edge - 0.5 for edge in range(1, most + 2)],
        color=[c for _, c in kinds],
        label=[kind for kind, _ in kinds],
        stacked=True,
    )
    left.locator_params(integer=True)
    left.set_xlabel("requests an answer", fontsize=9)
    left.set_ylabel("answers", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    timed = [row for row in rows if row["plain_seconds"] is not None]
    for kind, colour in kinds:
        chosen = [row for row in timed if row["kind"] == kind]
        right.scatter([r["plain_seconds"] for r in chosen], [r["seconds"] for r in chosen], color=colour, s=16, alpha=0.75, label=kind)
    longest = max((max(row["plain_seconds"], row["seconds"]) for row in timed), default=1.0)
    right.plot([0, longest], [0, longest], color="#9aa5b1", linewidth=0.9, linestyle="--", label="same time")
    right.set_xlabel("plain remote (s)", fontsize=9)
    right.set_ylabel("unlearned (s)", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    return uri(figure)


def trade_off(points: Sequence[dict[str, Any]], marked: dict[str, Any], thresholds: Any) -> Any:
    """Figure of a calibration: forget answers changed (left) and retain answers identical (right) by alpha, a line a margin.

    Only the filter of the `marked` point is drawn; dotted lines are the thresholds, the star is that point.
    """
    figure, panels = _figure(10.6, 3.6, ncols=2, sharey=True)
    margins = sorted({point["margin"] for point in points})
    sides = (
        ("forget_changed", "forget answers changed", FORGET, thresholds.forget_changed),
        ("retain_identical", "retain answers identical", RETAIN, thresholds.retain_identical),
    )
    for axis, (name, label, colour, threshold) in zip(panels, sides, strict=True):
        for place, margin in enumerate(margins):
            line = [point for point in points if point["margin"] == margin and point["filter"] == marked["filter"]]
            shade = 0.25 + 0.75 * (place + 1) / len(margins)
            values = [point[name] for point in line]
            axis.plot([p["alpha"] for p in line], values, color=colour, alpha=shade, marker="o", markersize=3, label=f"margin {margin:g}")
        axis.axhline(threshold, color=INK, linewidth=0.9, linestyle=":")
        axis.plot([marked["alpha"]], [marked[name]], color=ACCENT, marker="*", markersize=13, linestyle="none")
        axis.set_xlabel("alpha", fontsize=9)
        axis.set_title(label, fontsize=10, loc="left", color=INK)
        axis.set_ylim(-0.03, 1.05)
        axis.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("share", fontsize=9)
    return figure
