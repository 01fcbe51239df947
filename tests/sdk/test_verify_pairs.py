"""Verification with a pair: the shift of o' against o, the tail filled in by o, and what is still certain then."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uld_adapters.errors import UsageError
from uld_adapters.logprobs import Score, TopLogprobs
from uld_offset_models.shift import Rule, completed, completed_ensemble, ensemble, shift_of, untouched
from uld_sdk.sampling import Sampling, gumbel, process
from uld_sdk.scoring import score_continuation
from uld_sdk.verify import Mode, Verdict, judge

ROWS = 40


def normalised(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits)


class Pair:
    """A pair's reading made of the logits of both models."""

    def __init__(self, tuned: np.ndarray, frozen: np.ndarray, gate: float | None = None) -> None:
        self.gate, self._frozen = gate, normalised(frozen)
        self._change = (1.0 if gate is None else gate) * (normalised(tuned) - self._frozen)
        self.peak = float(np.abs(self._change).max())

    def bounds(self) -> None:
        return None

    def excess(self) -> np.ndarray:
        return self._change

    def frozen(self) -> np.ndarray:
        return self._frozen


def case(seed: int, k: int, *, scale: float = 2.0, like: float = 0.7) -> tuple[np.ndarray, TopLogprobs, Pair]:
    """A target, its report, and a pair whose frozen model is `like` the target in part."""
    rng = np.random.default_rng(seed)
    log_p = normalised(rng.normal(size=ROWS) * scale)
    order = np.argsort(-log_p)[:k]
    frozen = like * log_p + (1 - like) * rng.normal(size=ROWS) * scale
    pair = Pair(frozen + rng.normal(size=ROWS) * scale / 2, frozen, 0.6)
    return log_p, TopLogprobs.build(order, log_p[order], complete=k == ROWS), pair


def truth(log_p: np.ndarray, pair: Pair, rule: Rule) -> np.ndarray:
    """The method's q over the whole vocabulary, in plain words."""
    weights = []
    for p, d in zip(log_p, pair.excess(), strict=True):
        size = max(0.0, abs(d) - rule.margin)
        weights.append(math.exp(p + rule.alpha * math.copysign(size, d)) if p >= log_p.max() + math.log(rule.filter or 1e-300) else 0.0)
    return np.array(weights) / sum(weights)


def estimate(top: TopLogprobs, pair: Pair, rule: Rule) -> np.ndarray:
    """Q with the tail as the tail policy has it, in plain words; the tail's tokens share its mass as the frozen model would.

    Where the filter ends within K nothing of the tail is kept, whatever the frozen model thinks of it.
    """
    log_p = np.full(ROWS, -np.inf)
    log_p[top.ids] = top.logprobs
    ends = bool(rule.filter) and top.logprobs[-1] < top.logprobs[0] + math.log(rule.filter)
    if rule.tail == "complete" and not top.complete and not ends:
        mass, outside = max(1 - np.exp(top.logprobs).sum(), 1e-300), [v for v in range(ROWS) if v not in top.ids]
        share = np.exp(pair.frozen()[outside])
        log_p[outside] = np.log(mass * share / share.sum())
    return truth(log_p, pair, rule)


def dense(verdict: Verdict, values: dict[int, float]) -> np.ndarray:
    out = np.zeros(ROWS)
    for token in verdict.ranking:
        out[token] = values[token]
    return out


RULES = st.builds(
    Rule,
    alpha=st.floats(0.0, 2.0),
    margin=st.sampled_from([0.0, 0.5, 2.0]),
    filter=st.sampled_from([0.0, 0.01]),
    method=st.just("offset"),
    tail=st.sampled_from(["truncate", "complete"]),
)


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS), rule=RULES, constant=st.floats(-50, 50))
@settings(max_examples=100, deadline=None)
def test_a_pair_of_equals_gives_the_targets_distribution(seed: int, k: int, rule: Rule, constant: float) -> None:
    _, top, pair = case(seed, k)
    same = Pair(pair.frozen() + constant, pair.frozen())
    assert untouched(same.peak, Rule(rule.alpha, 1e-9, rule.filter, "offset", rule.tail))
    assert untouched(0.0, rule), "without a margin, too"
    q = ensemble(top, shift_of(same.excess(), rule), 0.0)
    np.testing.assert_allclose(q.logprobs, normalised(top.logprobs), atol=1e-9)
    whole = completed(top, same.frozen())
    q = completed_ensemble(top, same.frozen(), shift_of(same.excess(), rule), 0.0)
    np.testing.assert_allclose(q.logprobs, whole[q.ids], atol=1e-9)
    assert (np.diff(q.logprobs) <= 0).all()
    if top.tail_mass > 1e-12:
        np.testing.assert_allclose(whole[top.ids], top.logprobs, atol=1e-9)
        assert np.exp(whole).sum() == pytest.approx(1)


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS), rule=RULES)
@settings(max_examples=200, deadline=None)
def test_the_ensemble_is_the_formula(seed: int, k: int, rule: Rule) -> None:
    _, top, pair = case(seed, k)
    shift = shift_of(pair.excess(), rule)
    q = ensemble(top, shift, rule.filter)
    if rule.tail == "complete" and q.tail:
        q = completed_ensemble(top, pair.frozen(), shift, rule.filter)
    mine = np.zeros(ROWS)
    mine[q.ids] = np.exp(q.logprobs)
    np.testing.assert_allclose(mine, estimate(top, pair, rule), atol=1e-9)


@given(seed=st.integers(0, 10_000), k=st.integers(2, ROWS - 1), rule=RULES, constant=st.floats(-50, 50))
@settings(max_examples=60, deadline=None)
def test_nothing_depends_on_a_constant_added_to_either_models_logits(seed: int, k: int, rule: Rule, constant: float) -> None:
    rng = np.random.default_rng(seed)
    tuned, frozen = rng.normal(size=ROWS), rng.normal(size=ROWS)
    _, top, _ = case(seed, k)
    pairs = (Pair(tuned, frozen), Pair(tuned + constant, frozen - 2 * constant))
    verdicts = [judge(top, pair, rule, Sampling(1.0, seed=3), Mode.MATCH, 0) for pair in pairs]
    assert verdicts[0].ranking == verdicts[1].ranking
    assert verdicts[0].bound == pytest.approx(verdicts[1].bound, abs=1e-7)


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS - 1), rule=RULES, like=st.floats(0, 1), scale=st.sampled_from([0.5, 2.0, 6.0]))
@settings(max_examples=600, deadline=None)
def test_exact_greedy_positions_are_exact_and_bounds_hold(seed: int, k: int, rule: Rule, like: float, scale: float) -> None:
    log_p, top, pair = case(seed, k, like=like, scale=scale)
    verdict = judge(top, pair, rule, Sampling(), Mode.GREEDY, 0)
    if not verdict.touched:
        return
    whole, mine = truth(log_p, pair, rule), estimate(top, pair, rule)
    if verdict.exact:
        assert verdict.token == int(whole.argmax())
        assert not verdict.completed
    else:
        assert verdict.token == int(mine.argmax())
        assert 0.5 * np.abs(mine - whole).sum() <= verdict.bound + 1e-9
        assert verdict.completed == (rule.tail == "complete")
    if rule.tail == "complete" and not verdict.exact and not rule.filter:
        assert set(verdict.ranking) == set(range(ROWS)), "full support: what the server hides can be promoted"


OPTIONS = st.fixed_dictionaries(
    {"temperature": st.one_of(st.just(1.0), st.floats(0.3, 2.0))},
    optional={"top_k": st.integers(1, ROWS), "top_p": st.floats(0.05, 1.0), "min_p": st.floats(0.0, 0.6)},
)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(2, ROWS - 1),
    options=OPTIONS,
    rule=RULES,
    like=st.floats(0, 1),
    scale=st.sampled_from([0.3, 2.0, 5.0]),
)
@settings(max_examples=1500, deadline=None)
def test_the_sampled_bound_holds_after_every_cut(
    seed: int, k: int, options: dict[str, float], rule: Rule, like: float, scale: float
) -> None:
    log_p, top, pair = case(seed, k, like=like, scale=scale)
    sampling = Sampling(**options, seed=1)
    verdict = judge(top, pair, rule, sampling, Mode.MATCH, 0)
    if not verdict.touched:
        return

    def drawn_from(q: np.ndarray) -> np.ndarray:
        order = np.argsort(-q, kind="stable")
        out = np.zeros(ROWS)
        with np.errstate(divide="ignore"):
            out[order] = np.exp(process(np.log(q[order]), sampling))
        return out

    mine, whole = drawn_from(estimate(top, pair, rule)), drawn_from(truth(log_p, pair, rule))
    assert all(mine[token] < 1e-9 for token in set(verdict.ranking) ^ set(np.flatnonzero(mine).tolist()))  # rounding at top-p's border
    with np.errstate(divide="ignore"):
        scores = np.log(mine) + gumbel(1, 0, np.arange(ROWS))
    assert verdict.token == int(scores.argmax())
    assert 0.5 * np.abs(mine - whole).sum() <= verdict.bound + 1e-7
    assert verdict.exact == (verdict.bound == 0)


def test_a_hidden_refusal_is_promoted_only_when_the_tail_is_completed() -> None:
    log_p = normalised(np.array([5.0, 4.0, 3.0, -2.0, -4.0, -4.0]))
    top = TopLogprobs.build([0, 1, 2], log_p[:3])
    frozen = normalised(np.zeros(6))
    pair = Pair(frozen + np.array([-6.0, -6.0, -6.0, 6.0, 0.0, 0.0]), frozen)
    choices = {}
    for tail in ("truncate", "complete"):
        verdict = judge(top, pair, Rule(1.0, 0.0, 0.0, "offset", tail), Sampling(), Mode.GREEDY, 0)
        choices[tail] = verdict.token
        assert not verdict.exact
        assert verdict.bound > 0.1
    assert choices == {"truncate": 0, "complete": 3}


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS), rule=RULES, told=st.booleans())
@settings(max_examples=200, deadline=None)
def test_scores_lie_between_their_bounds(seed: int, k: int, rule: Rule, told: bool) -> None:
    log_p, top, pair = case(seed, k)
    if rule.filter:
        return
    for token in range(0, ROWS, 7):
        value = log_p[token] if told or token in top.ids else np.nan
        result = score_continuation(Score((token,), np.array([value]), (top,)), [pair], rule)
        touched = not untouched(pair.peak, rule)
        q = truth(log_p, pair, rule) if touched else np.exp(log_p)
        assert result.lower[0] - 1e-9 <= math.log(q[token]) <= result.upper[0] + 1e-9
        assert result.lower[0] <= result.estimates[0] <= result.upper[0]
        if touched and rule.tail == "complete" and token in top.ids:
            assert result.logprob == pytest.approx(math.log(estimate(top, pair, rule)[token]), abs=1e-6)


def test_a_soft_threshold_leaves_small_changes_alone() -> None:
    rule = Rule(alpha=2.0, margin=0.5, filter=0.0, method="offset")
    np.testing.assert_allclose(shift_of(np.array([-2.0, -0.5, 0.0, 0.4, 0.5, 1.5]), rule), [-3.0, 0, 0, 0, 0, 2.0])
    assert untouched(0.5, rule)
    assert not untouched(0.51, rule)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"alpha": -1.0, "method": "offset"}, "adds"), ({"alpha": -1.0}, "the minus is in the formula")]
)
def test_an_alpha_of_the_wrong_sign_is_told_the_formula(wrong: dict[str, float | str], words: str) -> None:
    with pytest.raises(UsageError, match=r"alpha is -1\.0") as caught:
        Rule(**wrong)
    assert words in caught.value.hint


def test_an_assistant_cannot_complete_a_tail() -> None:
    with pytest.raises(UsageError, match="no frozen model"):
        Rule(tail="complete")
