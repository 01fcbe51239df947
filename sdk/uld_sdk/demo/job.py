"""The demo from first to last: own answers, training, answers before and after, figures, report."""

import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uld_sdk.demo.compare import in_bulk, sampled, side_by_side
from uld_sdk.demo.figures import SMALL, Plan, build_report, headline, write_report
from uld_sdk.demo.plain import PlainAnswer, PlainRemote, own_answers
from uld_sdk.demo.questions import KINDS, Kind, Question, Questions, load_questions
from uld_sdk.demo.server import LlamaCppServer, packaged_model
from uld_sdk.demo.table import side_by_side_table
from uld_sdk.evaluation.answers import Answered

Line = Callable[[str], None]


class Clock:
    """Seconds of each phase, announced as it begins."""

    def __init__(self, on_line: Line) -> None:
        self.on_line = on_line
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, line: str) -> Iterator[None]:
        """Time one phase."""
        self.on_line(line)
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)


@dataclass(frozen=True)
class Stage:
    """What every demo stands on: how much it does, the questions, and the model that answers them."""

    plan: Plan
    questions: Questions
    model: Path
    model_hash: str
    tokenizer: Any
    clock: Clock
    began: float

    def own_answers(self, output: Path) -> dict[str, PlainAnswer]:
        """The model's own answers to the training questions."""
        return ask_model(
            self.plan,
            self.questions,
            model=self.model,
            model_hash=self.model_hash,
            tokenizer=self.tokenizer,
            cache=output / "own_answers.json",
            clock=self.clock,
        )


def set_stage(*, output: Path, data: Path | None, small: bool, steps: int | None, max_seconds: float | None, on_line: Line) -> Stage:
    """Read the questions and the model's tokenizer, and make the output folder."""
    plan = SMALL if small else Plan()
    questions = load_questions(data)
    model = packaged_model()
    output.mkdir(parents=True, exist_ok=True)
    clock, began = Clock(on_line), time.perf_counter()
    with clock.phase("tokenizer", f"model: {model.name}, served by llama.cpp on 127.0.0.1"):
        from uld_offset_models.assistant import base_fingerprint, load_base_tokenizer

        tokenizer = load_base_tokenizer(model)
        model_hash = base_fingerprint(model)
    plan = replace(plan, steps=steps or plan.steps, max_seconds=max_seconds)
    return Stage(plan, questions.small() if small else questions, model, model_hash, tokenizer, clock, began)


def run_demo(
    *,
    output: Path,
    top_logprobs: int,
    preset: str,
    max_seconds: float | None,
    steps: int | None,
    open_report: bool,
    data: Path | None,
    small: bool,
    on_line: Line,
) -> dict[str, Any]:
    """See `uld_sdk.demo.run`."""
    stage = set_stage(output=output, data=data, small=small, steps=steps, max_seconds=max_seconds, on_line=on_line)
    plan, questions, clock = replace(stage.plan, layers=stage.plan.layers if preset == "gated" else None), stage.questions, stage.clock
    own = stage.own_answers(output)
    assistant = output / "assistant"
    counts = {kind: len(questions.of(kind, "train")) for kind in KINDS}
    with clock.phase("training", f"training an assistant on {counts['forget']} forget and {counts['retain']} retain rows, preset {preset}"):
        trained = train_assistant(plan, questions, own, model=stage.model, output=assistant, preset=preset)
    rows, drawn = measure(
        plan, questions, own, model=stage.model, tokenizer=stage.tokenizer, assistant=assistant, top_logprobs=top_logprobs, clock=clock
    )
    report = build_report(
        plan, rows, drawn, trained, model=stage.model, preset=preset, top_logprobs=top_logprobs, own_topic=data is not None
    )
    return finish(report, rows, stage, output=output, open_report=open_report)


def finish(report: dict[str, Any], rows: list[Answered], stage: Stage, *, output: Path, open_report: bool) -> dict[str, Any]:
    """Write the report and tell its figures."""
    on_line = stage.clock.on_line
    report["seconds"] = {**stage.clock.seconds, "total": round(time.perf_counter() - stage.began, 2)}
    write_report(report, output)
    on_line(side_by_side_table(rows))
    for line in headline(report):
        on_line(line)
    on_line(f"wrote {output / 'report.json'} and {output / 'report.html'} after {report['seconds']['total']:.0f} s")
    if open_report:
        webbrowser.open((output / "report.html").resolve().as_uri())
    return report


def ask_model(
    plan: Plan, questions: Questions, *, model: Path, model_hash: str, tokenizer: Any, cache: Path, clock: Clock
) -> dict[str, PlainAnswer]:
    """The model's own answers to the training questions, from the cache file of an earlier run where it still fits."""
    texts = [row.text for kind in KINDS for row in questions.of(kind, "train")]
    with (
        clock.phase("own_answers", f"asking the model itself {len(texts)} training questions"),
        LlamaCppServer(model, parallel=plan.slots, threads=plan.threads) as server,
    ):
        own, kept = own_answers(
            PlainRemote(server.url, tokenizer),
            texts,
            max_new_tokens=plan.max_new_tokens,
            concurrency=plan.slots,
            cache=cache,
            model_hash=model_hash,
        )
    if kept:
        clock.on_line(f"  taken from {cache}, kept by an earlier run with the same model and questions (delete it to ask again)")
    return own


def training_rows(questions: Questions, own: dict[str, PlainAnswer], kind: Kind) -> list[dict[str, str]]:
    """The model's own answers; each phrasing is a row of its own, since the model answers each in its own words."""
    return [{"question": row.text, "answer": own[row.text].text} for row in questions.of(kind, "train") if own[row.text].text.strip()]


def train_assistant(
    plan: Plan, questions: Questions, own: dict[str, PlainAnswer], *, model: Path, output: Path, preset: str, **settings: Any
) -> Any:
    """Train on the model's own answers; `settings` are those of `train` that the plan does not hold."""
    from uld_sdk.training import train

    return train(
        base=str(model),
        forget=training_rows(questions, own, "forget"),
        retain=training_rows(questions, own, "retain"),
        output=output,
        **{"method": "uld", "preset": preset, "layers": plan.layers, "steps": plan.steps, "max_seconds": plan.max_seconds, **settings},
        overwrite=True,
    )


def measure(
    plan: Plan,
    questions: Questions,
    own: dict[str, PlainAnswer],
    *,
    model: Path,
    tokenizer: Any,
    assistant: Path,
    top_logprobs: int,
    clock: Clock,
) -> tuple[list[Answered], dict[str, Any]]:
    """All answers after, the held-out ones beside the plain remote's, and the sampled figures."""
    served = {"model": model, "tokenizer": tokenizer, "assistant": assistant, "top_logprobs": top_logprobs}
    # One core for the server, as if it were another machine; one slot, for values do not depend on what is computed beside them.
    with connected(**served, slots=1, threads=1) as (client, remote):
        rows = held_out(client, remote, questions, max_new_tokens=plan.max_new_tokens, clock=clock)
        some = _spread(questions.of("retain", "holdout"), plan.sampled)
        with clock.phase("sampled", f"{len(some)} held-out retain questions, sampled"):
            drawn = sampled(client, remote, some, max_new_tokens=plan.max_new_tokens)
    with connected(**served, slots=plan.slots, threads=plan.threads) as (client, _):
        for kind in KINDS:
            some = _spread(questions.of(kind, "train"), plan.bulk)
            with clock.phase(f"{kind}_train", f"{len(some)} training {kind} questions again, all at once"):
                rows += in_bulk(client, some, own, tokenizer, max_new_tokens=plan.max_new_tokens, concurrency=plan.slots)
    return rows, drawn


def held_out(client: Any, remote: PlainRemote, questions: Questions, *, max_new_tokens: int, clock: Clock) -> list[Answered]:
    """The held-out questions, each asked of the client beside the plain remote."""
    rows: list[Answered] = []
    for kind in reversed(KINDS):
        some = questions.of(kind, "holdout")
        with clock.phase(f"{kind}_holdout", f"{len(some)} held-out {kind} questions, before and after"):
            rows += side_by_side(client, remote, some, max_new_tokens=max_new_tokens)
    return rows


@contextmanager
def connected(
    *, model: Path, tokenizer: Any, assistant: Path, top_logprobs: int, slots: int, threads: int
) -> Iterator[tuple[Any, PlainRemote]]:
    """A server with the model, a client that answers through the assistant, and the plain remote."""
    from uld_sdk import UnlearnedClient

    with (
        LlamaCppServer(model, parallel=slots, threads=threads) as server,
        UnlearnedClient(
            backend="llamacpp",
            base_url=server.url,
            assistant=str(assistant),
            assistant_base=str(model),
            tokenizer=tokenizer,
            top_logprobs=top_logprobs,
            trace=True,
        ) as client,
    ):
        client.generate("Hello.", max_new_tokens=2)  # connects and probes: neither belongs to an answer
        yield client, PlainRemote(server.url, tokenizer)


def _spread(rows: list[Question], count: int) -> list[Question]:
    """At most `count` rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]
