"""The HTML page of a report: one file with nothing loaded from elsewhere."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from uld_sdk.evaluation import plots

FIRST = 4  # answers of each set shown unfolded
FORGET_GOAL = {"uld": 0.30, "offset": 0.60}  # held-out ROUGE-L at most
TRAINING_GOAL = {"uld": 120, "offset": 300}  # seconds


def render(report: dict[str, Any]) -> str:
    """The page for a report as `report.json` holds it."""
    page = Template((files("uld_sdk.evaluation") / "page.html").read_text(encoding="utf-8"))
    held_out = [row for row in report["rows"] if row["part"] == "holdout"]
    forget = [row for row in held_out if row["kind"] == "forget"]
    # Neighbours of the topic first: they are what could go wrong.
    retain = sorted((row for row in held_out if row["kind"] == "retain"), key=lambda row: (row["identical"], not row["neighbour"]))
    settings = report["settings"]
    return page.substitute(
        title=escape(f"Unlearning {settings['topic']}"),
        subtitle=escape(
            f"{settings['model']} behind {settings['server']}, top {settings['top_logprobs']} log-probabilities a token; "
            f"preset {settings['preset']}, alpha {settings['alpha']}, margin {settings['margin']} nats; {report['created']}"
        ),
        cards="".join(_cards(report)),
        compared=_compared(report.get("compared", [])),
        rouge_plot=plots.rouge_bars(report, goal=FORGET_GOAL[settings["method"]]),
        training_plot=plots.training_curves(report["training_history"]),
        gate_plot=plots.gate_along(_telling(forget, retain), settings["margin"]),
        latency_plot=plots.requests_and_latency(held_out),
        answers=_answers("forget", forget) + _answers("retain", retain),
        tables=_tables(report),
    )


def _telling(forget: Sequence[dict[str, Any]], retain: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One forgotten answer and the neighbour of the topic that came nearest to being touched."""
    chosen = [max(forget, key=lambda row: len(row["steps"]))] if forget else []
    near = [row for row in retain if row["neighbour"] and row["steps"]] or list(retain)
    if near:
        chosen.append(max(near, key=lambda row: max((step["peak"] for step in row["steps"]), default=0.0)))
    return chosen


def _cards(report: dict[str, Any]) -> list[str]:
    """The headline figures, each with its target."""
    requests = report["requests_per_answer"]
    more = report["loops_after"] - report["loops_before"]
    forget, retain = report["forget_rouge"]["holdout"], report["retain_rouge"]["holdout"]
    unchanged = report["forget_unchanged"]["holdout"]
    method = report["settings"]["method"]
    least, longest = FORGET_GOAL[method], TRAINING_GOAL[method]
    facts = [
        (f"{forget:.2f}", "forget ROUGE-L", f"at most {least:.2f}", forget <= least),
        (str(unchanged), "forget answers unchanged", "none", unchanged == 0),
        (f"{retain:.2f}", "retain ROUGE-L", "at least 0.95", retain >= 0.95),
        (f"{report['retain_identical']:.0%}", "retain answers identical", "at least 90%", report["retain_identical"] >= 0.9),
        (f"{report['retain_untouched']:.0%}", "retain answers untouched", "at least 80%", report["retain_untouched"] >= 0.8),
        (f"{requests['retain']:.2f}", "requests a retain answer", "at most 1.1", requests["retain"] <= 1.1),
        (f"{report['loops_after']}", "looping answers", f"{report['loops_before']} before, at most one more", more <= 1),
        (f"{report['training_seconds']:.0f} s", "training", f"at most {longest} s", report["training_seconds"] <= longest),
    ]
    return [
        f'<div class="card {"met" if met else "missed"}"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>target: {escape(goal)}</small></div>"
        for value, name, goal, met in facts
    ]


def _compared(lines: Sequence[dict[str, Any]]) -> str:
    """A table of several variants on the held-out questions, nothing where there is one alone."""
    if not lines:
        return ""
    heads = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in lines[0])
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in line.values()) + "</tr>" for line in lines)
    return f"<h2>Beside each other</h2><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _answers(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    shown = "".join(_answer(row) for row in rows[:FIRST])
    rest = "".join(_answer(row) for row in rows[FIRST:])
    return shown + (f"<details><summary>{len(rows) - FIRST} more held-out {kind} answers</summary>{rest}</details>" if rest else "")


def _answer(row: dict[str, Any]) -> str:
    tags = [f'<span class="tag {row["kind"]}">{row["kind"]}</span>']
    notes = ["near neighbour"] if row["neighbour"] else []
    notes += ["untouched at every position"] if row["untouched"] else [f"{row['changed']} of {row['positions']} tokens changed"]
    notes.append(f"{row['requests']} request" + ("s" if row["requests"] != 1 else ""))
    tags += [f'<span class="tag note">{escape(note)}</span>' for note in notes]
    after = "".join(_token(step) for step in row["steps"]) or escape(row["after"])
    return (
        f'<div class="answer"><h3>{escape(row["question"])}{"".join(tags)}</h3><div class="two">'
        f'<div><h4>Before</h4><div class="text">{escape(row["before"])}</div></div>'
        f'<div><h4>After</h4><div class="text">{after}</div></div></div></div>'
    )


def _token(step: dict[str, Any]) -> str:
    state = " changed" if step["changed"] else " touched" if step["touched"] else ""
    gate = "" if step["gate"] is None else f"\ngate {step['gate']:.3f}"
    tip = f"remote wanted {json.dumps(step['remote'], ensure_ascii=False)}{gate}\npeak {step['peak']:.1f} nats"
    return f'<span class="t{state}" data-tip="{escape(tip, quote=True)}">{escape(step["text"])}</span>'


def _tables(report: dict[str, Any]) -> str:
    figures = {key: value for key, value in report.items() if key not in ("rows", "training_history", "settings", "versions", "created")}
    parts = (("Figures", figures, " open"), ("Settings", report["settings"], ""), ("Versions", report["versions"], ""))
    shown = "<details{}><summary>{}</summary><table>{}</table></details>"
    return "".join(shown.format(is_open, name, _lines(values)) for name, values, is_open in parts)


def _lines(values: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
        return str(value)

    return "".join(f"<tr><td><code>{escape(key)}</code></td><td>{escape(shown(value))}</td></tr>" for key, value in values.items())
