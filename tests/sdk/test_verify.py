"""Verification as pure mathematics: shift, ensemble, certainty, and draws that have the distribution they claim."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from uld_adapters.errors import UsageError
from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.shift import Rule, ensemble, reported, uld_shift, untouched
from uld_sdk.sampling import Sampling, gumbel, process
from uld_sdk.verify import Mode, end_stands, judge, undone

ROWS = 40
RULE = Rule(alpha=0.75, margin=1.0, filter=0.01)


class Thought:
    """A small model's reading made of given logits."""

    gate = 0.5

    def __init__(self, logits: np.ndarray) -> None:
        self._excess = logits - np.logaddexp.reduce(logits) + math.log(len(logits))
        self.peak = float(self._excess.max())

    def bounds(self) -> None:
        return None

    def excess(self) -> np.ndarray:
        return self._excess


def random_case(seed: int, k: int, *, scale: float = 2.0, nameless: int = 0) -> tuple[np.ndarray, TopLogprobs, Thought]:
    """Of the k most probable tokens all but the best may be nameless: reported, but nobody can tell which they are."""
    rng = np.random.default_rng(seed)
    log_p = rng.normal(size=ROWS) * scale
    log_p -= np.logaddexp.reduce(log_p)
    order = np.argsort(-log_p)[:k]
    hidden = rng.permutation(np.arange(1, k))[:nameless]
    kept, neutral = np.delete(order, hidden), log_p[order[hidden]].tolist()
    return (
        log_p,
        TopLogprobs.build(kept, log_p[kept], complete=k == ROWS and not neutral, neutral=neutral),
        Thought(rng.normal(size=ROWS) * scale),
    )


def full_ensemble(log_p: np.ndarray, thought: Thought, rule: Rule) -> np.ndarray:
    """The method's q over the whole vocabulary, in plain words."""
    kept = log_p >= log_p.max() + math.log(rule.filter) if rule.filter else np.ones(len(log_p), dtype=bool)
    weight = np.exp(log_p + uld_shift(thought.excess(), rule)) * kept
    return weight / weight.sum()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_complete_reports_give_the_full_ensemble(seed: int) -> None:
    log_p, top, thought = random_case(seed, ROWS)
    q = ensemble(top, uld_shift(thought.excess(), RULE), RULE.filter)
    dense = np.zeros(ROWS)
    dense[q.ids] = np.exp(q.logprobs)
    np.testing.assert_allclose(dense, full_ensemble(log_p, thought, RULE), atol=1e-12)
    assert q.bound == 0.0


@given(seed=st.integers(0, 10_000), constant=st.floats(-50, 50), k=st.integers(2, ROWS))
@settings(max_examples=60, deadline=None)
def test_nothing_depends_on_a_constant_added_to_the_logits(seed: int, constant: float, k: int) -> None:
    _, top, _ = random_case(seed, k)
    logits = np.random.default_rng(seed).normal(size=ROWS)
    first, second = Thought(logits), Thought(logits + constant)
    for one, other in [(first, second)]:
        a, b = (ensemble(top, uld_shift(t.excess(), RULE), RULE.filter) for t in (one, other))
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-9)


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS))
@settings(max_examples=60, deadline=None)
def test_a_uniform_assistant_changes_nothing(seed: int, k: int) -> None:
    _, top, _ = random_case(seed, k)
    uniform = Thought(np.full(ROWS, 3.0))
    assert untouched(uniform.peak, RULE)
    for rule in (RULE, Rule(margin=0.0, filter=0.0)):
        q = ensemble(top, uld_shift(uniform.excess(), rule), 0.0)
        np.testing.assert_allclose(q.logprobs, top.logprobs - np.logaddexp.reduce(top.logprobs), atol=1e-9)


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS - 1), margin=st.sampled_from([0.0, 1.0, 3.0]), nameless=st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_exact_greedy_positions_are_exact_and_bounds_hold(seed: int, k: int, margin: float, nameless: int) -> None:
    rule = Rule(alpha=0.75, margin=margin, filter=0.01)
    log_p, top, thought = random_case(seed, k, nameless=nameless)
    truth = full_ensemble(log_p, thought, rule)
    q = ensemble(top, uld_shift(thought.excess(), rule), rule.filter)
    dense = np.zeros(ROWS)
    dense[q.ids] = np.exp(q.logprobs)
    assert 0.5 * np.abs(dense - truth).sum() <= q.bound + 1e-12
    verdict = judge(top, thought, rule, Sampling(), Mode.GREEDY, 0)
    if verdict.exact and verdict.touched:
        assert verdict.token == int(truth.argmax())


OPTIONS = st.fixed_dictionaries(
    {"temperature": st.one_of(st.just(1.0), st.floats(0.3, 2.0))},
    optional={"top_k": st.integers(1, ROWS), "top_p": st.floats(0.05, 1.0), "min_p": st.floats(0.0, 0.6)},
)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(2, ROWS - 1),
    options=OPTIONS,
    margin=st.sampled_from([0.0, 1.0, 50.0]),
    scale=st.sampled_from([0.3, 2.0, 5.0]),
    nameless=st.sampled_from([0, 0, 1, 3]),
)
@settings(max_examples=1500, deadline=None)
def test_the_sampled_bound_holds_after_every_cut(
    seed: int, k: int, options: dict[str, float], margin: float, scale: float, nameless: int
) -> None:
    log_p, top, thought = random_case(seed, k, scale=scale, nameless=nameless)
    rule = Rule(alpha=0.75, margin=margin, filter=0.01)
    sampling = Sampling(**options, seed=1)
    verdict = judge(top, thought, rule, sampling, Mode.MATCH, 0)
    truth = full_ensemble(log_p, thought, rule) if verdict.touched else np.exp(log_p)
    order = np.argsort(-truth, kind="stable")
    expected = np.zeros(ROWS)
    with np.errstate(divide="ignore"):
        expected[order] = np.exp(process(np.log(truth[order]), sampling))
    q = ensemble(top, uld_shift(thought.excess(), rule), rule.filter) if verdict.touched else reported(top)
    known = not verdict.touched and sampling.temperature == 1.0 and sampling.top_k is None
    drawn = np.zeros(ROWS)
    drawn[q.ids] = np.exp(process(q.logprobs, sampling, tail=q.tail if known else 0.0))
    assert set(verdict.ranking) == set(np.flatnonzero(drawn))
    assert 0.5 * np.abs(drawn - expected).sum() <= verdict.bound + 1e-7


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.0, 4.0), margin=st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=300, deadline=None)
def test_an_unreported_end_stands_only_where_it_is_the_best_of_all(seed: int, alpha: float, margin: float) -> None:
    """The server ends where p_M(end) is the largest; the full ensemble agrees whenever the end is said to stand."""
    log_p, _, thought = random_case(seed, ROWS)
    end, rule = int(log_p.argmax()), Rule(alpha=alpha, margin=margin)
    if end_stands(thought, rule, Sampling(), frozenset({end, ROWS + 3})):
        assert full_ensemble(log_p, thought, rule).argmax() == end
    assert not end_stands(thought, rule, Sampling(1.0), frozenset({end}))


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS), temperature=st.floats(0.2, 3.0))
@example(seed=77, k=33, temperature=0.21875)  # the tail is lost to rounding
@settings(max_examples=200, deadline=None)
def test_an_undone_temperature_keeps_differences_and_bounds_the_tail(seed: int, k: int, temperature: float) -> None:
    log_p, top, _ = random_case(seed, k)
    warm = log_p / temperature - np.logaddexp.reduce(log_p / temperature)
    back = undone(TopLogprobs.build(top.ids, warm[top.ids], complete=top.complete), temperature)
    np.testing.assert_allclose(np.diff(back.logprobs), np.diff(top.logprobs), atol=1e-9)
    assert back.tail_mass >= top.tail_mass - 1e-9
    assert np.exp(back.logprobs).sum() <= 1 + 1e-9


def test_a_nucleus_inside_the_report_is_the_servers_own() -> None:
    log_p, top, thought = random_case(3, 12, scale=2.0)
    verdict = judge(top, thought, Rule(margin=50.0), Sampling(1.0, top_p=0.5, seed=1), Mode.MATCH, 0)
    assert verdict.exact
    assert len(verdict.ranking) == np.searchsorted(np.cumsum(np.sort(np.exp(log_p))[::-1]), 0.5) + 1


def test_gumbel_draws_have_the_distribution_and_know_nothing_of_the_others() -> None:
    log_q = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    ids = np.array([7, 3, 11, 5])
    draws = [int(ids[np.argmax(log_q + gumbel(9, position, ids))]) for position in range(4000)]
    counts = [draws.count(i) for i in ids]
    assert chisquare(counts, np.exp(log_q) * len(draws)).pvalue > 1e-3
    np.testing.assert_array_equal(gumbel(9, 4, ids)[:2], gumbel(9, 4, ids[:2]))


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 5, "top_p": 0.7, "min_p": 0.2}])
def test_sampling_options_are_those_of_transformers(cut: dict[str, float]) -> None:
    import torch
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    values = np.sort(np.random.default_rng(1).normal(size=12) * 2)[::-1].copy()
    values -= np.logaddexp.reduce(values)
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chain = LogitsProcessorList([TemperatureLogitsWarper(0.7), *(warpers[name](value) for name, value in cut.items())])
    theirs = torch.log_softmax(chain(torch.zeros(1, 1, dtype=torch.long), torch.tensor(values)[None]), -1)[0].numpy()
    np.testing.assert_allclose(process(values, Sampling(0.7, **cut)), theirs, atol=1e-9)


def test_padding_rows_of_the_target_are_dropped() -> None:
    top = TopLogprobs.build([ROWS + 2, 1, 2], [-0.1, -2.0, -3.0])
    assert ROWS + 2 not in ensemble(top, np.zeros(ROWS), 0.01).ids


@pytest.mark.parametrize("highest", [-2500.0, 0.0, 2500.0])
def test_shifts_beyond_what_can_be_exponentiated_have_bounds(highest: float) -> None:
    """A path says nothing of unreported tokens: 50 nats times alpha stand for them."""
    shift = np.full(ROWS, highest)
    shift[[1, 2]] = 0.0
    found = ensemble(TopLogprobs.build([1, 2], [-0.5, -2.0]), shift, 0.0)
    tail = 1 - np.exp(-0.5) - np.exp(-2.0)
    expected = {-2500.0: 0.0, 0.0: tail, 2500.0: 1.0}[highest]
    assert found.bound == pytest.approx(expected)
    assert found.unseen == pytest.approx(np.log(tail) + highest)


@pytest.mark.parametrize(
    "wrong", [{"alpha": -0.1}, {"margin": -1.0}, {"filter": 1.0}, {"alpha": math.nan}, {"margin": math.nan}, {"filter": math.nan}]
)
def test_rules_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Rule(**wrong)
