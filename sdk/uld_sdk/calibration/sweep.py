"""The sweep: every rule of a grid measured on answers that were observed once, by the functions of generation. Pure: no I/O."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product

import numpy as np

from uld_adapters.logprobs import Score
from uld_offset_models.shift import Rule
from uld_sdk.calibration.position import Observed
from uld_sdk.certainty import widened
from uld_sdk.sampling import Sampling
from uld_sdk.scoring import score_continuation
from uld_sdk.verify import Mode, judge

SWEPT = ("alpha", "margin", "filter")
_GREEDY = Sampling()


@dataclass(frozen=True)
class Point:
    """What one rule does, in shares from 0 to 1 and nats a token.

    forget_changed: forget answers with at least one token whose greedy choice changes.
    forget_tokens_changed: mean share of such tokens in a forget answer.
    forget_drop: mean of log p_M - log q over the answers' own tokens, of those that q can still write; None where there are none.
    forget_removed: share of the answers' own tokens that q never writes (outside the kept set F).
    retain_identical: retain answers without such a token.
    retain_untouched: retain answers that are proved untouched at every position.
    retain_change, retain_removed: mean of |log p_M - log q| and share, as above.
    exact: positions of both sets where the server's top k provably suffices.
    """

    alpha: float
    margin: float
    filter: float
    forget_changed: float
    forget_tokens_changed: float
    forget_drop: float | None
    forget_removed: float
    retain_identical: float
    retain_untouched: float
    retain_change: float | None
    retain_removed: float
    exact: float

    def to_dict(self) -> dict[str, float | None]:
        """A JSON-able dictionary of all of it."""
        return asdict(self)


@dataclass
class _Measured:
    """Sums over one answer."""

    tokens: int
    exact: int
    touched: int = 0
    changed: int = 0
    removed: int = 0
    drops: list[float] = field(default_factory=list)  # of the touched tokens; untouched ones have a drop of 0


def swept(values: Rule | Point) -> dict[str, float]:
    """What a sweep varies."""
    return {name: getattr(values, name) for name in SWEPT}


def sweep(forget: Sequence[Observed], retain: Sequence[Observed], rules: Iterable[Rule]) -> list[Point]:
    """A point for each rule, whose margin must be no less than the observer's."""
    return [_point([measure(a, rule) for a in forget], [measure(a, rule) for a in retain], rule) for rule in rules]


def grid(like: Rule, alphas: Iterable[float], margins: Iterable[float], filters: Iterable[float]) -> list[Rule]:
    """Every combination in the formula of a rule, alphas rising in the outer loop."""
    return [replace(like, alpha=alpha, margin=margin, filter=ratio) for alpha, margin, ratio in product(alphas, margins, filters)]


def measure(answer: Observed, rule: Rule) -> _Measured:
    """One answer under one rule, each position given the answer's own tokens before it."""
    found = _Measured(answer.tokens, exact=answer.settled)
    for at in answer.positions:
        verdict = judge(at.top, at.reading, rule, _GREEDY, Mode.GREEDY, 0)
        if verdict.touched and (ends := rule.bounds(at.reading)) is not None:
            verdict = widened(verdict, at.top, ends, rule.shift(at.reading), rule.ratio(at.reading), _GREEDY)
        found.exact += verdict.exact
        if not verdict.touched:
            continue
        found.touched += 1
        found.changed += verdict.token != at.own
        (after,) = score_continuation(Score((at.label,), np.array([at.logprob]), (at.top,)), [at.reading], rule).upper
        if after == -np.inf:
            found.removed += 1
        elif not np.isnan(at.logprob):
            found.drops.append(at.logprob - after)
    return found


def _point(forget: Sequence[_Measured], retain: Sequence[_Measured], rule: Rule) -> Point:
    positions = sum(answer.tokens for answer in (*forget, *retain))
    return Point(
        alpha=rule.alpha,
        margin=rule.margin,
        filter=rule.filter,
        forget_changed=_share(answer.changed > 0 for answer in forget),
        forget_tokens_changed=_share(answer.changed / answer.tokens for answer in forget),
        forget_drop=_a_token(sum(sum(answer.drops) for answer in forget), forget),
        forget_removed=_removed(forget),
        retain_identical=_share(answer.changed == 0 for answer in retain),
        retain_untouched=_share(answer.touched == 0 for answer in retain),
        retain_change=_a_token(sum(abs(drop) for answer in retain for drop in answer.drops), retain),
        retain_removed=_removed(retain),
        exact=sum(answer.exact for answer in (*forget, *retain)) / positions,
    )


def _share(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _removed(answers: Sequence[_Measured]) -> float:
    return sum(answer.removed for answer in answers) / sum(answer.tokens for answer in answers)


def _a_token(total: float, answers: Sequence[_Measured]) -> float | None:
    """The mean over untouched tokens and those whose change is known, None where there are none."""
    told = sum(answer.tokens - answer.touched + len(answer.drops) for answer in answers)
    return float(total / told) if told else None
