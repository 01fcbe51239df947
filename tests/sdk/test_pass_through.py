"""The decode loop itself, over twelve tokens: what it writes has the distribution q, drawn anew or verified, and survives lost answers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from toy import END, ROWS, Remote, Track, Worker, table
from uld_adapters import http
from uld_adapters.errors import RequestRejected, ServerBusy
from uld_adapters.vocabulary.alignment import Identity
from uld_offset_models.shift import Rule, uld_shift
from uld_sdk.generation import Answer
from uld_sdk.reading import Reader
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling, process
from uld_sdk.settings import Settings
from uld_sdk.verify import Mode

RULE = Rule(alpha=3.0, margin=1.0, filter=0.05)
CUT, WARM, PLAIN = Sampling(0.8, top_k=8), Sampling(1.3), Sampling(1.0)
PROMPT = [3]
LOG_P, SHARP, LOG_A = (
    table(1, 1.0),
    table(1, 4.0),
    table(3, np.where(np.arange(ROWS) % 2, 2.5, 0.1)),
)  # after every second token nothing is touched


def q_after(last: int, sampling: Sampling, log_p: np.ndarray) -> np.ndarray:
    """The unlearned distribution after a token, the user's sampling applied: the method in plain words."""
    excess = LOG_A[last] + math.log(ROWS)
    log_q = log_p[last].copy()
    if excess.max() > RULE.margin:
        log_q[log_q < log_q.max() + math.log(RULE.filter)] = -np.inf
        log_q = log_q + uld_shift(excess, RULE)
    order = np.argsort(-log_q, kind="stable")
    out = np.zeros(ROWS)
    out[order] = np.exp(process(log_q[order], sampling))
    return out


async def write(remote: Remote, mode: Mode, sampling: Sampling, *, n: int = 2, draft: Any = "stream") -> Result:
    settings = Settings(RULE, sampling, mode, n, draft=draft, trace=True)
    reader = Reader(Worker(LOG_A), Identity(), PROMPT, Track())  # type: ignore[arg-type]
    answer = Answer(remote, remote.capabilities, settings, PROMPT, frozenset({END}), reader=reader)  # type: ignore[arg-type]
    return [piece async for piece in answer.run()][-1].result  # type: ignore[return-value]


@pytest.mark.parametrize("draft", [1, "stream"])
@pytest.mark.parametrize(
    ("mode", "processed", "sampling", "k"),
    [
        (Mode.PASS_THROUGH, False, CUT, ROWS),
        (Mode.PASS_THROUGH, False, PLAIN, 9),  # some drafts are not among the reported
        (Mode.PASS_THROUGH, False, WARM, 9),  # what the server drew from is not known: a fresh draw
        (Mode.PASS_THROUGH, True, CUT, ROWS),  # cut away by the server: asked for again
        (Mode.PASS_THROUGH, True, WARM, ROWS),  # a temperature alone is undone
        (Mode.MATCH, False, CUT, ROWS),
    ],
)
async def test_two_tokens_have_the_distribution_of_q(mode: Mode, processed: bool, sampling: Sampling, k: int, draft: Any) -> None:
    log_p = LOG_P if k == ROWS else SHARP  # sharp enough that the filter's tokens are all among the reported
    assert any(row.max() + math.log(ROWS) > RULE.margin for row in LOG_A), "no touched position"
    assert any(row.max() + math.log(ROWS) <= RULE.margin for row in LOG_A), "no untouched position"
    after = [q_after(last, sampling, log_p) for last in range(ROWS)]
    expected = {(a, b): after[3][a] * after[a][b] for a in range(ROWS) if a != END for b in range(ROWS)}
    expected[END, -1] = after[3][END]
    expected = {pair: p for pair, p in expected.items() if p > 0}
    count = 6000
    np.random.seed(0)
    remote = Remote(log_p, k=k, processed=processed, rng=np.random.default_rng(5))
    written: Counter[tuple[int, int]] = Counter()
    for seed in range(count):
        ids = (await write(remote, mode, replace(sampling, seed=seed), draft=draft)).token_ids
        written[ids[0], ids[1] if len(ids) > 1 else -1] += 1
    assert set(written) <= set(expected)
    assert remote.asked_again == (mode is Mode.PASS_THROUGH and processed and sampling is CUT)
    common = sorted((pair for pair, p in expected.items() if p * count >= 5), key=expected.__getitem__)[1:]  # the others go together
    seen, wanted = [written[pair] for pair in common], [expected[pair] * count for pair in common]
    seen, wanted = [*seen, count - sum(seen)], [*wanted, count - sum(wanted)]
    assert chisquare(seen, wanted).pvalue > 1e-4


@pytest.mark.parametrize("lost", [1, 3])
async def test_a_lost_second_look_does_not_shift_the_readings(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """After a failed re-ask of a touched position the next request's tokens are judged by their own readings."""
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    seen_touched = 0
    for seed in range(40):
        remote = Remote(LOG_P, processed=True, rng=np.random.default_rng(seed))
        remote.fail_next = [ServerBusy("busy")] * lost
        result = await write(remote, Mode.PASS_THROUGH, CUT, n=8)
        last = PROMPT[-1]
        for step in result.report.trace:
            assert step.peak == pytest.approx(LOG_A[last].max() + math.log(ROWS))
            assert step.touched == (step.peak > RULE.margin)
            last = step.token_id
            seen_touched += step.touched
    assert seen_touched > 20


class TextOnly(Remote):
    """Takes text, in which "a" and "a" in a row are one token: a prompt that ends in "a" joins an answer that begins with one."""

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        return [2, *prefix[2:]] if list(prefix[:2]) == [1, 1] else prefix


@pytest.mark.parametrize("mode", [Mode.GREEDY, Mode.PASS_THROUGH])
async def test_an_answer_may_join_the_prompts_last_token(mode: Mode) -> None:
    """To the server the prompt "a" and the answer's "a" become one token; the answer goes on from there, whole, and ends."""
    log_p = np.full((ROWS, ROWS), -20.0)
    log_p[1, 1] = log_p[2, 4] = log_p[4, 5] = log_p[5, END] = -1e-6
    log_p[1, 4] = -3.0
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    log_a = np.full((ROWS, ROWS), -math.log(ROWS))
    if mode is Mode.GREEDY:  # the second "a" is to be forgotten: "d" takes its place, and is sent back as text
        log_a[1] = np.log(np.where(np.arange(ROWS) == 1, 0.99, 0.01 / (ROWS - 1)))
    remote = TextOnly(log_p, rng=np.random.default_rng(0))
    sampling = Sampling(0.0 if mode is Mode.GREEDY else 0.1)
    settings = Settings(Rule(alpha=4.0, margin=1.0, filter=0.01), sampling, mode, 9, draft="stream" if mode is Mode.GREEDY else 1)
    reader = Reader(Worker(log_a), Identity(), [6], Track())  # type: ignore[arg-type]
    answer = Answer(remote, remote.capabilities, settings, [1], frozenset({END}), reader=reader)  # type: ignore[arg-type]
    result: Any = [piece async for piece in answer.run()][-1].result
    assert (result.text, result.token_ids, result.finish_reason) == ("ade", (1, 4, 5, END), "stop")
    assert result.report.retokenised == 1


class Halves(Remote):
    """Takes text, and no text ends in the token "b": the first half of a character."""

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        return None if prefix[-1] == 2 else prefix


async def test_a_forgotten_token_does_not_come_back_when_the_better_one_cannot_be_sent() -> None:
    log_p = np.full((ROWS, ROWS), -30.0)
    log_p[3, 4], log_p[3, 2] = math.log(0.8), math.log(0.2)
    log_a = np.full((ROWS, ROWS), -math.log(ROWS))
    log_a[3] = np.log(np.where(np.arange(ROWS) == 4, 0.99, 0.01 / (ROWS - 1)))
    remote = Halves(log_p, k=2, rng=np.random.default_rng(0))
    settings = Settings(Rule(alpha=4.0, margin=1.0), Sampling(), Mode.GREEDY, 4)
    reader = Reader(Worker(log_a), Identity(), PROMPT, Track())  # type: ignore[arg-type]
    answer = Answer(remote, remote.capabilities, settings, PROMPT, frozenset({END}), reader=reader)  # type: ignore[arg-type]
    released: list[str] = []

    async def read() -> None:
        async for piece in answer.run():
            released.append(piece.text)

    with pytest.raises(RequestRejected, match="sent back to this server as text"):
        await read()
    assert released == []
