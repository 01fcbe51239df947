"""The demo's figures with top 20 and top 5, and with the presets `paper` and `release` given the seconds that `gated` took."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from uld_offset_models.assistant import base_fingerprint, load_base_tokenizer
from uld_sdk.demo import job
from uld_sdk.demo.figures import Plan, build_report, write_report
from uld_sdk.demo.questions import load_questions
from uld_sdk.demo.server import packaged_model

VARIANTS = (("gated, top 20", "gated", 20), ("gated, top 5", "gated", 5), ("paper", "paper", 20), ("release", "release", 20))
LEFT_OUT = ("rows", "training_history", "versions", "created")


def measure(work: Path) -> dict[str, Any]:
    """Four variants on one training set; the plain remote is asked anew beside each."""
    work.mkdir(parents=True, exist_ok=True)
    model, questions, clock = packaged_model(), load_questions(), job.Clock(lambda line: print(f"  {line}", flush=True))
    tokenizer, plan = load_base_tokenizer(model), Plan()
    own = job.ask_model(
        plan,
        questions,
        model=model,
        model_hash=base_fingerprint(model),
        tokenizer=tokenizer,
        cache=work / "own_answers.json",
        clock=clock,
    )
    figures: dict[str, Any] = {}
    gated = None
    for name, preset, top in VARIANTS:
        print(name, flush=True)
        folder = work / preset
        this = plan if preset == "gated" else replace(plan, layers=None, max_seconds=gated.seconds if gated else None)
        if top == 5 and gated is not None:
            trained = gated
        else:
            trained = job.train_assistant(this, questions, own, model=model, output=folder, preset=preset)
        gated = gated or trained
        rows, drawn = job.measure(this, questions, own, model=model, tokenizer=tokenizer, assistant=folder, top_logprobs=top, clock=clock)
        report = build_report(this, rows, drawn, trained, model=model, preset=preset, top_logprobs=top, own_topic=False)
        write_report(report, work / name.replace(", ", "-").replace(" ", "-"))
        figures[name] = {key: value for key, value in report.items() if key not in LEFT_OUT}
    return {"variants": figures}
