"""One answer before and after unlearning, and the figures over many of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from uld_sdk.evaluation.loops import loops
from uld_sdk.evaluation.rouge import mean, rouge_l_recall


@dataclass(frozen=True)
class TokenStep:
    """One token of an answer: what the remote wanted there, the gate c, and the peak in nats.

    The peak is max(log p_a - log u) of an assistant, max c |log p_o' - log p_o| of a pair.
    """

    text: str
    remote: str
    gate: float | None
    peak: float
    touched: bool
    changed: bool


@dataclass(frozen=True)
class Answered:
    """A question with its answer before (the plain remote) and after (through the assistant or the pair).

    Seconds are wall clock; `plain_seconds` is None where the plain remote was not timed beside it.
    """

    id: str
    kind: str
    part: str
    neighbour: bool
    question: str
    before: str
    after: str
    before_ids: tuple[int, ...]
    after_ids: tuple[int, ...]
    untouched: bool
    requests: int
    changed: int
    positions: int
    seconds: float
    seconds_first: float
    plain_seconds: float | None = None
    plain_seconds_first: float | None = None
    steps: tuple[TokenStep, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether the answer is the remote's own, token for token."""
        return self.before_ids == self.after_ids

    def to_dict(self) -> dict[str, Any]:
        """A row of the report, without token ids."""
        row = asdict(self)
        del row["before_ids"], row["after_ids"]
        row["identical"] = self.identical
        row["rouge"] = round(rouge_l_recall(self.before, self.after), 4)
        row["loops_before"], row["loops_after"] = loops(self.before_ids), loops(self.after_ids)
        return row


def _timed(rows: Sequence[Answered]) -> list[Answered]:
    return [row for row in rows if row.plain_seconds is not None]


def ratio(rows: Sequence[Answered], ours: Callable[[Answered], float], plain: Callable[[Answered], float | None]) -> float | None:
    """Sum of our seconds over the sum of the plain remote's, on the rows where both were timed side by side."""
    timed = _timed(rows)
    base = sum(plain(row) or 0.0 for row in timed)
    return sum(ours(row) for row in timed) / base if base else None


def summarise(rows: Sequence[Answered]) -> dict[str, Any]:
    """The figures of a report over all answered questions; shares in [0, 1], counts of answers, ratios of seconds."""

    def of(kind: str, part: str | None = None) -> list[Answered]:
        return [row for row in rows if row.kind == kind and part in (None, row.part)]

    def over(kind: str, value: Callable[[Answered], float]) -> dict[str, float]:
        return {part: round(mean(value(row) for row in of(kind, part)), 4) for part in ("train", "holdout") if of(kind, part)}

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    near = [row for row in of("retain", "holdout") if row.neighbour]
    kept = of("retain", "holdout")
    timed_retain, timed_forget = _timed(of("retain")), _timed(of("forget"))
    return {
        "forget_rouge": over("forget", lambda row: rouge_l_recall(row.before, row.after)),
        "retain_rouge": over("retain", lambda row: rouge_l_recall(row.before, row.after)),
        "forget_unchanged": {part: sum(row.identical for row in of("forget", part)) for part in ("train", "holdout")},
        "retain_identical": round(mean(row.identical for row in kept), 4),
        "retain_untouched": round(mean(row.untouched for row in kept), 4),
        "retain_identical_neighbours": round(mean(row.identical for row in near), 4) if near else None,
        "retain_train_identical": over("retain", lambda row: row.identical).get("train"),
        "untouched_but_different": sum(row.untouched and not row.identical for row in rows),
        "requests_per_answer": {kind: round(mean(row.requests for row in of(kind, "holdout")), 3) for kind in ("forget", "retain")},
        "wall_ratio": rounded(ratio(timed_retain, lambda row: row.seconds, lambda row: row.plain_seconds)),
        "wall_ratio_forget": rounded(ratio(timed_forget, lambda row: row.seconds, lambda row: row.plain_seconds)),
        "first_token_ratio": rounded(ratio(timed_retain, lambda row: row.seconds_first, lambda row: row.plain_seconds_first)),
        "loops_before": sum(loops(row.before_ids) for row in rows),
        "loops_after": sum(loops(row.after_ids) for row in rows),
        "answers": {f"{kind}_{part}": len(of(kind, part)) for kind in ("forget", "retain") for part in ("train", "holdout")},
    }
