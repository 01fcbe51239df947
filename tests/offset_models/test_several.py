"""The sum of several shifts against its definition, one token at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toy import ROWS, Thought, table
from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.several import JointReading, JointRule
from uld_offset_models.shift import Rule
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Mode, is_touched, judge, stands_unseen, touching

RULES = st.builds(
    Rule, alpha=st.sampled_from([0.0, 0.5, 2.0]), margin=st.sampled_from([0.0, 0.5, 1.5, 9.0]), filter=st.sampled_from([0.01, 0.1, 0.5])
)


@given(seed=st.integers(0, 10_000), rules=st.lists(RULES, min_size=1, max_size=3), k=st.integers(1, ROWS))
@settings(max_examples=300, deadline=None)
def test_the_best_token_is_that_of_the_sum(seed: int, rules: list[Rule], k: int) -> None:
    log_p = table(seed, 1.5)[0]
    excesses = [table(seed + 1 + at, 1.5)[0] + np.log(ROWS) for at in range(len(rules))]
    reading, rule = JointReading(tuple(Thought(excess) for excess in excesses)), JointRule(tuple(rules))
    order = np.argsort(-log_p, kind="stable")[:k]
    top = TopLogprobs.build(order, log_p[order], complete=k == ROWS)

    def moves(excess: np.ndarray, one: Rule) -> bool:
        return one.alpha > 0 and (one.margin == 0 or any(value > one.margin for value in excess))

    def shift(excess: np.ndarray, one: Rule, token: int) -> float:
        over = excess[token] - one.margin
        return -one.alpha * (over if one.margin == 0 else max(0.0, over))

    acting = [at for at, (excess, one) in enumerate(zip(excesses, rules, strict=True)) if moves(excess, one)]
    verdict = judge(top, reading, rule, Sampling(), Mode.GREEDY, 0)
    assert touching(reading, rule) == tuple(acting)
    assert verdict.touched == is_touched(reading, rule) == bool(acting)
    assert stands_unseen(reading, rule, Mode.GREEDY) == (not acting)
    assert reading.peak == max(excess.max() for excess in excesses)
    score = {int(token): log_p[token] for token in order}
    if acting:
        ratio = max(rules[at].filter for at in acting)
        kept = [token for token in score if log_p[token] >= log_p[order[0]] + np.log(ratio)]
        score = {token: log_p[token] + sum(shift(excesses[at], rules[at], token) for at in acting) for token in kept}
    assert list(verdict.ranking) == sorted(score, key=lambda token: (-score[token], token))


@given(seed=st.integers(0, 10_000), rule=RULES)
@settings(max_examples=100, deadline=None)
def test_one_that_moves_nothing_changes_nothing(seed: int, rule: Rule) -> None:
    """Beside an assistant that is untouched here, another decides as if alone: the same filter, the same ranking."""
    log_p, thought = table(seed, 1.5)[0], Thought(table(seed + 1, 1.5)[0] + np.log(ROWS))
    quiet, strict = Thought(np.full(ROWS, 0.4)), Rule(alpha=9.0, margin=0.5, filter=0.9)
    top = TopLogprobs.build(np.argsort(-log_p), np.sort(log_p)[::-1], complete=True)
    both = judge(top, JointReading((thought, quiet)), JointRule((rule, strict)), Sampling(), Mode.GREEDY, 0)
    assert both == judge(top, thought, rule, Sampling(), Mode.GREEDY, 0)


class Changed(Thought):
    """The reading of a pair, which has a frozen model."""

    def __init__(self, change: np.ndarray, frozen: np.ndarray) -> None:
        super().__init__(change)
        self.peak = float(np.abs(change).max())
        self._frozen = frozen

    def frozen(self) -> np.ndarray:
        return self._frozen


@given(seed=st.integers(0, 10_000), k=st.integers(1, ROWS - 1), temperature=st.sampled_from([0.0, 1.0]), silent=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_tail_follows_the_first_pair_that_touches(seed: int, k: int, temperature: float, silent: bool) -> None:
    log_p, change, frozen, other = (table(seed + at, 1.5)[0] for at in range(4))
    order = np.argsort(-log_p, kind="stable")[:k]
    top = TopLogprobs.build(order, log_p[order])
    pair = Rule(alpha=1.0, margin=0.0, filter=0.0, method="offset", tail="complete")
    quiet = Rule(alpha=0.0, margin=0.0, filter=0.0, method="offset", tail="complete")
    plain = Rule(alpha=1.0, margin=90.0)
    parts = (Thought(change), Changed(change, other), Changed(change, frozen), Changed(change, other))
    rule = JointRule((plain, quiet, pair, quiet if silent else Rule(0.0, 0.0, 0.0, "offset", "truncate")))
    sampling, mode = Sampling(temperature, seed=3), Mode.MATCH if temperature else Mode.GREEDY
    joint = judge(top, JointReading(parts), rule, sampling, mode, 0)
    assert joint == judge(top, parts[2], pair, sampling, mode, 0)
