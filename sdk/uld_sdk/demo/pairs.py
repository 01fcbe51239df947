"""The demo of `--method offset`: a pair, plain and gated, with ULD beside them, on one topic and one server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_sdk.demo.figures import build_report
from uld_sdk.demo.job import Line, Stage, connected, finish, held_out, measure, set_stage, train_assistant, training_rows
from uld_sdk.demo.plain import PlainAnswer
from uld_sdk.demo.questions import KINDS
from uld_sdk.demo.server import LlamaCppServer
from uld_sdk.evaluation.answers import Answered, summarise

MAIN = "offset, gated"  # whose answers the report shows
VARIANTS: Mapping[str, dict[str, Any]] = {
    "ULD": {"method": "uld", "preset": "gated"},
    "offset": {"method": "offset", "preset": "offset", "objective": "npo+kl"},
    MAIN: {"method": "offset", "preset": "offset-gated", "objective": "npo+kl"},
}


def run_pairs(
    *,
    output: Path,
    top_logprobs: int,
    max_seconds: float | None,
    steps: int | None,
    open_report: bool,
    data: Path | None,
    small: bool,
    on_line: Line,
) -> dict[str, Any]:
    """Cache what the server says of the training rows, train all variants, and compare them on the held-out questions."""
    stage = set_stage(output=output, data=data, small=small, steps=steps, max_seconds=max_seconds, on_line=on_line)
    plan, questions, clock = stage.plan, stage.questions, stage.clock
    own = stage.own_answers(output)
    cached = cache_rows(stage, own, folder=output / "cache", top_logprobs=top_logprobs)
    compared, trained = [], {}
    for name, settings in VARIANTS.items():
        folder = output / _folder(name)
        trained[name] = _train(stage, own, folder, name, cached, settings)
        if name == MAIN:
            served = {"model": stage.model, "tokenizer": stage.tokenizer, "assistant": folder, "top_logprobs": top_logprobs}
            rows, drawn = measure(plan, questions, own, **served, clock=clock)
        else:
            rows, drawn = _answers(stage, folder, top_logprobs), {}
        compared.append(figures(name, rows, trained[name], caching=0.0 if name == "ULD" else cached.seconds))
    report = build_report(
        plan, rows, drawn, trained[MAIN], model=stage.model, preset=VARIANTS[MAIN]["preset"], top_logprobs=top_logprobs,
        own_topic=data is not None,
    )  # fmt: skip
    report["compared"] = compared
    result = finish(report, rows, stage, output=output, open_report=open_report)
    for line in table(compared):
        on_line(line)
    return result


def cache_rows(stage: Stage, own: dict[str, PlainAnswer], *, folder: Path, top_logprobs: int) -> Any:
    """The server's log-probabilities of all training rows, those of an earlier run where they still fit."""
    from uld_sdk.caching.job import cache

    forget, retain = (training_rows(stage.questions, own, kind) for kind in KINDS)
    count = len(forget) + len(retain)
    with (
        stage.clock.phase("caching", f"asking the server for its top {top_logprobs} log-probabilities of {count} training answers"),
        LlamaCppServer(stage.model, parallel=stage.plan.slots, threads=stage.plan.threads) as server,
    ):
        return cache(
            output=folder,
            forget=forget,
            retain=retain,
            backend="llamacpp",
            base_url=server.url,
            base=str(stage.model),
            top_logprobs=top_logprobs,
            concurrency=stage.plan.slots,
        )


def _train(stage: Stage, own: dict[str, PlainAnswer], folder: Path, name: str, cached: Any, settings: dict[str, Any]) -> Any:
    more = {} if settings["method"] == "uld" else {"cache": cached.path, "layers": None}
    with stage.clock.phase(f"training_{_folder(name)}", f"training: {name}"):
        return train_assistant(stage.plan, stage.questions, own, model=stage.model, output=folder, **{**settings, **more})


def _answers(stage: Stage, folder: Path, top_logprobs: int) -> list[Answered]:
    """The held-out questions, through the assistant or pair in a folder and beside the plain remote."""
    served = {"model": stage.model, "tokenizer": stage.tokenizer, "assistant": folder, "top_logprobs": top_logprobs}
    with connected(**served, slots=1, threads=1) as (client, remote):
        return held_out(client, remote, stage.questions, max_new_tokens=stage.plan.max_new_tokens, clock=stage.clock)


def figures(name: str, rows: Sequence[Answered], trained: Any, *, caching: float) -> dict[str, Any]:
    """One line of the comparison, over the held-out answers; shares in [0, 1], seconds of caching, loading and training."""
    found = summarise([row for row in rows if row.part == "holdout"])
    return {
        "variant": name,
        "forget_rouge": found["forget_rouge"]["holdout"],
        "retain_rouge": found["retain_rouge"]["holdout"],
        "forget_unchanged": found["forget_unchanged"]["holdout"],
        "retain_identical": found["retain_identical"],
        "retain_untouched": found["retain_untouched"],
        "requests_forget": found["requests_per_answer"]["forget"],
        "requests_retain": found["requests_per_answer"]["retain"],
        "caching_seconds": round(caching, 1),
        "loading_seconds": round(trained.manifest.training["loading_seconds"], 1),
        "training_seconds": round(trained.seconds, 1),
        "training_steps": trained.manifest.steps,
    }


COLUMNS = {  # as in the README of the benchmarks
    "forget_rouge": ("forget ROUGE-L", "{:.2f}"),
    "retain_rouge": ("retain ROUGE-L", "{:.2f}"),
    "retain_identical": ("identical", "{:.0%}"),
    "retain_untouched": ("untouched", "{:.0%}"),
    "requests_forget": ("requests, forget", "{:.1f}"),
    "requests_retain": ("requests, retain", "{:.2f}"),
    "caching_seconds": ("caching s", "{:.0f}"),
    "loading_seconds": ("loading s", "{:.0f}"),  # with what o says of the rows, by the first pair that needs it
    "training_seconds": ("training s", "{:.0f}"),
}


def table(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """The comparison as lines of text."""
    heads = ["", *(head for head, _ in COLUMNS.values())]
    lines = [[line["variant"], *(form.format(line[name]) for name, (_, form) in COLUMNS.items())] for line in compared]
    widths = [max(len(row[place]) for row in (heads, *lines)) for place in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *lines)]


def _folder(name: str) -> str:
    return name.lower().replace(", ", "-")
