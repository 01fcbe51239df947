"""How far a gradient from a top-k cache is off: `python benchmarks/run.py gradients`.

A pair is trained for a few steps on complete distributions. Then the gradient of each objective, as a top-k report with a completed
or a truncated tail gives it, is compared with that of the complete distributions: ||g_k - g|| / ||g||, the median over batches. The
small model is a cut of the target: with all of its layers it is the target itself, so that a completed tail is the true one; with
fewer it is another, worse model.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_rows import begin, rows
from torch import Tensor

from uld_offset_models.assistant import load_base
from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import Goal
from uld_offset_models.offset import OffsetPair
from uld_offset_models.offset_lessons import OffsetLessons
from uld_offset_models.refusals import BUILT_IN, read_refusals, refused
from uld_offset_models.steps import Steps
from uld_offset_models.target_record import TargetLogprobs
from uld_offset_models.target_side import CachedTarget, LocalTarget
from uld_offset_models.tuned import Tuned, make_trainable

Report = tuple[int, str]
REPORTS: tuple[Report, ...] = ((5, "complete"), (20, "complete"), (100, "complete"), (20, "truncate"))
OBJECTIVES = ("ga", "npo", "dpo", "relabel", "gd", "kl")
RATE, STEPS, BATCHES, BATCH = 0.0003, 4, 3, 2  # the preset's rate, before npo has saturated and its own gradient is next to nothing


class Reported(CachedTarget):
    """The complete distributions of a local target, cut to what a server with a cap of k reports, the label's own included."""

    def __init__(self, whole: LocalTarget, k: int, tail: str, vocabulary: int) -> None:
        super().__init__(self._found, tail=tail, vocabulary=vocabulary)  # type: ignore[arg-type]
        self.whole, self.k = whole, k

    def _found(self, prompt: Sequence[int], answer: Sequence[int]) -> TargetLogprobs:
        hidden = self.whole.states[Encoded((*prompt, *answer), len(prompt))]
        values = torch.log_softmax((hidden @ self.whole.head.T).double(), -1)
        top = values.topk(self.k, -1)
        label = values.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1).numpy()
        return TargetLogprobs(top.indices.numpy(), top.values.numpy(), label, 1 - np.exp(top.values.numpy()).sum(-1))


class Comparison:
    """One pair over one target, whose gradients can be taken from several reports."""

    def __init__(self, model: Path, rows: dict[str, list[Any]], *, layers: int | None) -> None:
        from uld_offset_models.data import read_rows
        from uld_offset_models.encoding import encode

        whole, tokenizer = load_base(model)
        forget, retain = ([row.example for row in read_rows(rows[kind], name=kind)] for kind in ("forget", "retain"))
        sets = [forget, retain, refused(forget, read_refusals(BUILT_IN), seed=0)]
        self.forget, self.retain, idle = (encode(tokenizer, some, chat_template=True, max_length=1024) for some in sets)
        self.refusals = dict(zip(self.forget, idle, strict=True))
        seen = list(dict.fromkeys([*self.forget, *self.retain, *idle]))
        target = Tuned(whole, tokenizer, trainable="full", autocast=False)
        self.side = LocalTarget(target.states(seen), target.head.detach())
        base, _ = load_base(model, layers=layers)
        states = Tuned(base, tokenizer, trainable="full", autocast=False).states(seen)
        lora = make_trainable(base, trainable="lora", rank=8, lora_alpha=8, seed=0)
        self.pair = OffsetPair(
            lora, tokenizer, goal=Goal("npo", "kl"), beta=0.1, alpha=1.0, gate=None, target=self.side, states=states,
            trainable="lora", autocast=False,
        )  # fmt: skip
        self._train()

    def _train(self) -> None:
        optimizer = torch.optim.AdamW(self.pair.trained().values(), lr=RATE)
        for step in range(STEPS):
            losses = self.pair(self._lesson(Goal("npo", "kl"), step, self.side))
            optimizer.zero_grad()
            (losses.forget + losses.retain).backward()
            torch.nn.utils.clip_grad_norm_(self.pair.trained().values(), 1.0)
            optimizer.step()

    def _lesson(self, goal: Goal, step: int, side: Any) -> Any:
        steps = Steps(self.forget, self.retain, batch=BATCH, seed=1, first=step, last=step + 1)
        return OffsetLessons(steps, goal, self.refusals, side, self.pair.frozen_states)[0]

    def gradient(self, objective: str, step: int, side: Any) -> Tensor:
        """The gradient of one objective on one batch, as one vector."""
        goal = Goal("npo", objective) if objective in ("gd", "kl") else Goal(objective, "none")
        self.pair.goal, self.pair.target = goal, side
        losses = self.pair(self._lesson(goal, step, side))
        loss = losses.retain if objective in ("gd", "kl") else losses.forget
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(self.pair.trained().values()))])

    def errors(self) -> dict[Report, dict[str, float]]:
        """Median relative error of each objective's gradient from each kind of report."""
        found: dict[Report, dict[str, list[float]]] = {report: {name: [] for name in OBJECTIVES} for report in REPORTS}
        for step in range(STEPS, STEPS + BATCHES):
            for name in OBJECTIVES:
                exact = self.gradient(name, step, self.side)
                for k, tail in REPORTS:
                    near = self.gradient(name, step, Reported(self.side, k, tail, self.pair.vocabulary))
                    found[k, tail][name].append(((near - exact).norm() / exact.norm()).item())
        return {report: {name: round(statistics.median(v), 4) for name, v in by_name.items()} for report, by_name in found.items()}


def measure(work: Path, *, cuts: Sequence[int | None] = (None, 24)) -> dict[str, Any]:
    """One entry a cut of the small model and a kind of report."""
    stage, own = begin(work / "offset")
    data, figures = rows(stage, own), []
    for layers in cuts:
        print(f"  gradients: {layers or 'all'} layers", flush=True)
        for (k, tail), errors in Comparison(stage.model, data, layers=layers).errors().items():
            figures.append({"layers": layers, "tail": tail, "k": k, "errors": errors})
    return {"gradients": figures}
