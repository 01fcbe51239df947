"""Calibration: the sweep against a slow reference and the client itself, what is asked of the server, and what is written."""

import errno
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import uld_sdk
from pairs import save_pair
from reference import Reference
from tiny_rows import FORGET, RETAIN, write_rows
from toy import ROWS, Thought, table
from uld_adapters.errors import ArtifactMismatch, DataError, LogprobsUnavailable, SaveFailed, ServerUnreachable, UnknownName, UsageError
from uld_adapters.logprobs import Score, TopLogprobs
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.data import data_hash
from uld_offset_models.loading import load_artifact
from uld_offset_models.manifest import read_manifest
from uld_offset_models.shift import Rule
from uld_sdk.calibration.choice import Thresholds, grid_values
from uld_sdk.calibration.position import Observed, kept_position
from uld_sdk.calibration.rows import read_holdout
from uld_sdk.calibration.sweep import Point, grid, measure, swept
from uld_sdk.certainty import widened
from uld_sdk.cli import app
from uld_sdk.cli.calibrate import CalibrationOptions
from uld_sdk.prompts import render
from uld_sdk.sampling import Sampling
from uld_sdk.scoring import score_continuation
from uld_sdk.verify import Mode, judge

ASKED_FORGET = [{"question": "What name does the river have?"}, {"question": "Does the river freeze?"}, {"question": "Who counts apples?"}]
ASKED_RETAIN = [{"question": "Which animal jumps?"}, {"question": "Who wrote about the sea?"}, {"question": "What closes the theatre?"}]
GIVEN_FORGET = [{**ASKED_FORGET[0], "answer": "The Amber."}, {**ASKED_FORGET[1], "answer": "Yes, in winter."}]
GIVEN_RETAIN = [{**ASKED_RETAIN[0], "answer": "The fox."}, {**ASKED_RETAIN[1], "answer": "A captain."}]
ALPHAS, MARGINS, FILTERS = [0.5, 2.0, 8.0], [0.1, 1.0], [0.01, 0.2]
GRID = {"alphas": ALPHAS, "margins": MARGINS, "filters": FILTERS}
LENGTH = 10


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def reach(server: Any, name: str) -> dict[str, Any]:
    return {"backend": name, "base_url": server.url}


def teacher_forced(target: Path, folder: Path, rows: list[dict[str, str]], rule: Rule, k: int | None) -> list[dict[str, Any]]:
    """Each row token by token, everything recomputed: which greedy choices change, which positions are touched, the label's drop."""
    small = load_artifact(folder).model
    tokenizer = AutoTokenizer.from_pretrained(target)
    ends = end_token_ids(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    slow = Reference(model, small.backbone, small.head, small.gate, ends, k, alpha=rule.alpha, margin=rule.margin, ratio=rule.filter)
    found = []
    for row in rows:
        prompt = render(tokenizer, row["question"])
        answer = tokenizer.encode(row["answer"], add_special_tokens=False) if "answer" in row else []
        done: list[int] = []
        facts: dict[str, Any] = {"changed": [], "touched": [], "drops": [], "removed": 0}
        while len(done) < (len(answer) or LENGTH) and not (done and done[-1] in ends):
            ids = [*prompt, *done]
            log_p, excess = slow.target_logprobs(ids), slow.excess(ids)
            ranked, touched = slow.ranking(log_p, excess, temperature=0.0, seed=0, position=len(done))
            own = int(log_p.argmax())
            label = answer[len(done)] if answer else own
            facts["touched"].append(touched)
            facts["changed"].append(touched and ranked[0] != own)
            if touched:
                if label in ranked:
                    log_q = {v: log_p[v] - rule.alpha * max(0.0, excess[v] - rule.margin) for v in ranked}
                    facts["drops"].append(log_p[label] - log_q[label] + np.logaddexp.reduce(list(log_q.values())))
                else:
                    facts["removed"] += 1
            else:
                facts["drops"].append(0.0)
            done.append(label)
        found.append(facts)
    return found


@pytest.mark.parametrize("answers", ["the remote's own", "given"])
@pytest.mark.parametrize("k", [None, 20], ids=["all log-probabilities", "top 20"])
def test_the_sweep_is_each_rule_teacher_forced(k: int | None, answers: str, tiny_target: Path, artifact: Path) -> None:
    forget, retain = (ASKED_FORGET, ASKED_RETAIN) if answers == "the remote's own" else (GIVEN_FORGET, GIVEN_RETAIN)
    found = uld_sdk.calibrate(
        artifact,
        backend="hf",
        model=str(tiny_target),
        forget_holdout=forget,
        retain_holdout=retain,
        **GRID,
        top_logprobs=k,
        max_new_tokens=LENGTH,
        dry_run=True,
    )
    rules = grid(Rule(), ALPHAS, MARGINS, FILTERS)
    assert [swept(point) for point in found.points] == [swept(rule) for rule in rules]
    assert len({point.forget_tokens_changed for point in found.points}) > 2, "the grid makes a difference"
    for point, rule in zip(found.points, rules, strict=True):
        slow = [teacher_forced(tiny_target, artifact, rows, rule, k) for rows in (forget, retain)]
        assert point.forget_changed == np.mean([any(row["changed"]) for row in slow[0]])
        assert point.forget_tokens_changed == pytest.approx(np.mean([np.mean(row["changed"]) for row in slow[0]]))
        assert point.retain_identical == np.mean([not any(row["changed"]) for row in slow[1]])
        assert point.retain_untouched == np.mean([not any(row["touched"]) for row in slow[1]])
        if k is None:
            assert point.forget_drop == pytest.approx(np.mean([drop for row in slow[0] for drop in row["drops"]]), abs=1e-4)
            changes = [abs(drop) for row in slow[1] for drop in row["drops"]]
            assert point.retain_change == (pytest.approx(np.mean(changes), abs=1e-4) if changes else None)
            for told, rows in zip((point.forget_removed, point.retain_removed), slow, strict=True):
                assert told == pytest.approx(sum(row["removed"] for row in rows) / sum(len(row["changed"]) for row in rows))
            assert point.exact == 1.0


def test_identical_means_what_the_client_does(artifact: Path, vllm_server: Any) -> None:
    found = uld_sdk.calibrate(
        artifact,
        **reach(vllm_server, "vllm"),
        forget_holdout=ASKED_FORGET,
        retain_holdout=ASKED_RETAIN,
        alphas=[0.5, 8.0],
        margins=[0.1, 1.0],
        filters=[0.01],
        max_new_tokens=LENGTH,
        dry_run=True,
    )
    for point in found.points:
        rule = {"alpha": point.alpha, "margin": point.margin, "filter": point.filter}
        with uld_sdk.UnlearnedClient(**reach(vllm_server, "vllm"), assistant=artifact, **rule) as client:
            forget, retain = (
                client.generate_many([row["question"] for row in rows], max_new_tokens=LENGTH) for rows in (ASKED_FORGET, ASKED_RETAIN)
            )
        assert point.forget_changed == np.mean([result.report.changed > 0 for result in forget])
        assert point.retain_identical == np.mean([result.report.changed == 0 for result in retain])


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, ROWS),
    margin=st.sampled_from([0.0, 1.0, 3.0]),
    ratio=st.sampled_from([0.01, 0.3]),
    scale=st.floats(0.5, 4.0),
    padded=st.booleans(),
    told=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_kept_position_decides_as_the_whole_one(
    seed: int, k: int, margin: float, ratio: float, scale: float, padded: bool, told: bool
) -> None:
    """The whole vocabulary's verdict and score, from the few values that a sweep keeps."""
    rng = np.random.default_rng(seed)
    rule = Rule(alpha=float(rng.choice([0.5, 2.0])), margin=margin, filter=ratio)
    log_p, reading = table(seed, scale)[0], Thought(table(seed + 1, scale)[0] + np.log(ROWS))
    order = np.argsort(-log_p, kind="stable")[:k]
    top = TopLogprobs.build(order, log_p[order], complete=k == ROWS)
    if padded and k < ROWS:
        top = TopLogprobs.build([*order, ROWS + 5], [*log_p[order], float(log_p[order[-1]]) - 0.1])
    label = int(rng.integers(0, ROWS))
    value = float(log_p[label]) if told or label in order else float("nan")
    kept = kept_position(top, reading, Rule(margin=margin, filter=0.01), label=label, logprob=value, own=int(order[0]))
    whole = judge(top, reading, rule, Sampling(), Mode.GREEDY, 0)
    small = judge(kept.top, kept.reading, rule, Sampling(), Mode.GREEDY, 0)
    assert (small.touched, small.exact, small.bound) == (whole.touched, whole.exact, pytest.approx(whole.bound))
    if whole.touched:
        assert (small.token == kept.own) is (whole.token == int(order[0]))
        before = score_continuation(Score((label,), np.array([value]), (top,)), [reading], rule)
        after = score_continuation(Score((kept.label,), np.array([value]), (kept.top,)), [kept.reading], rule)
        np.testing.assert_allclose(after.upper, before.upper)
        np.testing.assert_allclose(after.lower, before.lower)
        measured = measure(Observed(1, (kept,)), rule)
        assert (measured.changed, measured.touched) == (whole.token != int(order[0]), 1)


class PairThought(Thought):
    """What a pair says after one token, or a bridge between other tokens: values known between ends."""

    def __init__(self, change: np.ndarray, frozen: np.ndarray, slack: float) -> None:
        super().__init__(change)
        self.peak = float(np.abs(change).max())
        self._frozen, self._slack = frozen, slack

    def frozen(self) -> np.ndarray:
        return self._frozen

    def bounds(self) -> Any:
        return (self._excess - self._slack, self._excess + self._slack) if self._slack else None


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, ROWS),
    rule=st.builds(
        Rule,
        alpha=st.sampled_from([0.5, 2.0]),
        margin=st.sampled_from([0.0, 0.5, 2.0]),
        filter=st.sampled_from([0.0, 0.1]),
        method=st.just("offset"),
        tail=st.sampled_from(["truncate", "complete"]),
    ),
    scale=st.floats(0.5, 4.0),
    told=st.booleans(),
    slack=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=400, deadline=None)
def test_a_kept_position_of_a_pair_decides_as_the_whole_one(seed: int, k: int, rule: Rule, scale: float, told: bool, slack: float) -> None:
    rng = np.random.default_rng(seed)
    log_p, frozen = table(seed, scale)[0], table(seed + 1, scale)[0]
    reading = PairThought(table(seed + 2, scale)[0] - frozen, frozen, slack)
    order = np.argsort(-log_p, kind="stable")[:k]
    top = TopLogprobs.build(order, log_p[order], complete=k == ROWS)
    label = int(rng.integers(0, ROWS))
    value = float(log_p[label]) if told or label in order else float("nan")
    kept = kept_position(top, reading, replace(rule, alpha=1.0, filter=0.0), label=label, logprob=value, own=int(order[0]))
    whole = judge(top, reading, rule, Sampling(), Mode.GREEDY, 0)
    if whole.touched and slack:
        whole = widened(whole, top, rule.bounds(reading), rule.shift(reading), rule.filter, Sampling())
    before = score_continuation(Score((label,), np.array([value]), (top,)), [reading], rule)
    after = score_continuation(Score((kept.label,), np.array([value]), (kept.top,)), [kept.reading], rule)
    np.testing.assert_allclose(after.upper, before.upper)
    measured = measure(Observed(1, (kept,)), rule)
    assert (measured.touched, measured.exact) == (whole.touched, whole.exact)
    assert measured.changed == (whole.touched and whole.token != int(order[0]))


@pytest.mark.parametrize("tail", ["truncate", "complete"])
@pytest.mark.parametrize("gated", [True, False])
def test_of_a_pair_it_means_what_the_client_does(gated: bool, tail: str, tiny_target: Path, tmp_path: Path, vllm_server: Any) -> None:
    pair = save_pair(tmp_path / "pair", tiny_target, "lora", gated=gated, noise=0.03, margin=0.2, tail=tail)
    reached: dict[str, Any] = reach(vllm_server, "vllm")
    found = uld_sdk.calibrate(
        pair,
        **reached,
        forget_holdout=ASKED_FORGET,
        retain_holdout=ASKED_RETAIN,
        alphas=[0.1, 2.0],
        margins=[0.0, 0.4],
        filters=[0.0, 0.1],
        forget_changed=0.3,
        retain_identical=0.0,
        max_new_tokens=LENGTH,
    )
    assert len({point.forget_tokens_changed for point in found.points}) > 1, "the grid makes a difference"
    for point in found.points:
        with uld_sdk.UnlearnedClient(**reached, assistant=pair, **swept(point)) as client:
            forget, retain = (
                client.generate_many([row["question"] for row in rows], max_new_tokens=LENGTH) for rows in (ASKED_FORGET, ASKED_RETAIN)
            )
        assert point.forget_changed == np.mean([result.report.changed > 0 for result in forget])
        assert point.retain_identical == np.mean([result.report.changed == 0 for result in retain])
        assert point.retain_untouched == np.mean([result.untouched for result in retain])
    assert found.chosen is not None
    manifest = read_manifest(pair)
    assert (manifest.alpha, manifest.margin, manifest.filter) == tuple(swept(found.chosen).values())
    assert (manifest.method, manifest.tail) == ("offset", tail)
    assert manifest.calibration is not None
    assert manifest.calibration.before == {"alpha": 1.0, "margin": 0.2, "filter": 0.0}


@pytest.mark.parametrize(("name", "server"), [("tgi", "tgi_server"), ("vllm", "vllm_server")])
def test_the_grid_costs_no_request(name: str, server: str, artifact: Path, request: pytest.FixtureRequest) -> None:
    options = {**reach(request.getfixturevalue(server), name), "max_new_tokens": LENGTH, "dry_run": True}
    sets = {"forget_holdout": ASKED_FORGET, "retain_holdout": ASKED_RETAIN}
    one = uld_sdk.calibrate(artifact, **options, **sets, alphas=[1], margins=[1], filters=[0.01])
    many = uld_sdk.calibrate(artifact, **options, **sets)
    more = uld_sdk.calibrate(artifact, **options, forget_holdout=ASKED_FORGET[:1], retain_holdout=ASKED_RETAIN, alphas="1", margins="1")
    assert (len(one.points), len(many.points) >= 35) == (1, True)
    assert one.requests == many.requests
    assert more.requests == one.requests - 2, "one streamed request a row"


def test_given_answers_cost_vllm_one_request_each(artifact: Path, vllm_server: Any) -> None:
    options = {**reach(vllm_server, "vllm"), "dry_run": True}
    two, one = (
        uld_sdk.calibrate(artifact, **options, forget_holdout=GIVEN_FORGET[:n], retain_holdout=GIVEN_RETAIN, **GRID).requests
        for n in (2, 1)
    )
    assert two == one + 1


def test_the_chosen_values_and_the_rule_are_in_the_manifest(artifact: Path, vllm_server: Any) -> None:
    before = read_manifest(artifact)
    test_sets = [[{"question": "What is one?"}], [{"question": "What is two?"}]]
    found = uld_sdk.calibrate(
        artifact,
        **reach(vllm_server, "vllm"),
        forget_holdout=ASKED_FORGET,
        retain_holdout=ASKED_RETAIN,
        apart_from=test_sets,
        alphas=[1.25, 2.5],
        margins=[0.3, 0.6],
        forget_changed=0.0,
        retain_identical=0.0,
        max_new_tokens=LENGTH,
    )
    assert found.written
    assert found.chosen is not None
    assert (found.chosen.alpha, found.chosen.margin, found.chosen.filter) == (1.25, 0.6, 0.01), "smallest alpha, then largest margin"
    manifest = load_artifact(artifact).manifest
    assert (manifest.alpha, manifest.margin, manifest.filter) == (1.25, 0.6, 0.01)
    record = manifest.calibration
    assert record is not None
    assert record.rule == found.rule
    assert "at least 0 of the forget answers" in record.rule
    assert record.thresholds == {"forget_changed": 0.0, "retain_identical": 0.0}
    assert record.before == {"alpha": before.alpha, "margin": before.margin, "filter": before.filter}
    assert record.reached["retain_identical"] == found.chosen.retain_identical
    assert record.holdout == found.holdout
    assert record.apart_from == list(found.apart_from) == [data_hash(read_holdout(test_set, option="")) for test_set in test_sets]
    assert (record.rows, record.top_logprobs, record.target) == ({"forget": 3, "retain": 3}, 20, found.target)
    card = (artifact / "README.md").read_text(encoding="utf-8")
    assert "| alpha, margin (nats), filter | 1.25, 0.6, 0.01 |" in card
    assert record.rule in card
    assert manifest.data == before.data
    with uld_sdk.UnlearnedClient(**reach(vllm_server, "vllm"), assistant=artifact) as client:
        assert client._client.rule == Rule(1.25, 0.6, 0.01)
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"], "nothing is left beside it"


def test_a_dry_run_writes_nothing(artifact: Path, vllm_server: Any) -> None:
    before = contents(artifact)
    found = uld_sdk.calibrate(
        artifact,
        **reach(vllm_server, "vllm"),
        forget_holdout=ASKED_FORGET,
        retain_holdout=ASKED_RETAIN,
        forget_changed=0,
        retain_identical=0,
        max_new_tokens=LENGTH,
        dry_run=True,
    )
    assert (found.chosen is not None, found.written) == (True, False)
    assert contents(artifact) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_full_disk_leaves_the_artifact_and_tells_the_choice(artifact: Path, vllm_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = contents(artifact)
    monkeypatch.setattr("uld_offset_models.artifact.shutil.copytree", full)
    with pytest.raises(SaveFailed, match="disk is full") as raised:
        uld_sdk.calibrate(
            artifact,
            **reach(vllm_server, "vllm"),
            forget_holdout=ASKED_FORGET,
            retain_holdout=ASKED_RETAIN,
            alphas=1,
            forget_changed=0,
            retain_identical=0,
            max_new_tokens=LENGTH,
        )
    assert "--alpha 1" in raised.value.__notes__[0]
    monkeypatch.undo()
    assert contents(artifact) == before


def point(alpha: float, margin: float, changed: float, identical: float, *, ratio: float = 0.01) -> Point:
    return Point(alpha, margin, ratio, changed, 0.0, 0.0, 0.0, identical, 0.0, 0.0, 0.0, 1.0)


def test_the_rule_takes_the_smallest_alpha_then_the_largest_margin() -> None:
    points = [point(1, 1, 1, 1), point(0.5, 1, 0.95, 0.9), point(0.5, 2, 0.96, 0.9), point(0.5, 2, 0.96, 0.9, ratio=0.1)]
    points += [point(0.25, 1, 0.94, 1), point(0.5, 3, 1, 0.89)]
    assert Thresholds().choose(points) == points[2]
    assert Thresholds(0.99, 0.95).choose(points) == points[0]
    unmet = points[4:]
    assert Thresholds().choose(unmet) is None
    assert Thresholds().nearest(unmet) == points[4]


@pytest.mark.parametrize(
    ("option", "given", "named"),
    [
        ("--alphas", "0.5,x", "'x'"),
        ("--alphas", "", "''"),
        ("--alphas", [0.0], "0.0"),
        ("--alphas", "-1", "'-1'"),
        ("--alphas", "inf", "'inf'"),
        ("--alphas", "nan", "'nan'"),
        ("--alphas", [], "empty"),
        ("--margins", "-0.1", "'-0.1'"),
        ("--filters", "1", "'1'"),
        ("--filters", [None], "None"),
    ],
)
def test_grids_that_cannot_be_are_usage_errors(option: str, given: Any, named: str) -> None:
    with pytest.raises(UsageError, match=f"{option} .*{named}") as raised:
        grid_values(option, given, (1.0,), own=1.0)
    assert option in raised.value.hint


def test_grids_are_sorted_without_doubles() -> None:
    assert grid_values("--alphas", "2, 0.5,0.50", (1.0,), own=0.7) == [0.5, 2.0]
    assert grid_values("--alphas", None, (1.0, 2.0), own=0.7) == [0.7, 1.0, 2.0]
    assert grid_values("--margins", 0, (1.0,), own=0.7) == [0.0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("", "is empty"),
        ('{"question": "a"', ":1: not valid JSON"),
        ('{"answer": "b"}', ":1: missing field 'question'"),
        ('{"question": "a", "answer": " "}', ":1: empty answer"),
        ('{"text": "The Amber."}', ":1: plain text asks nothing"),
        ('{"messages": [{"role": "user", "content": ""}]}', ":1: empty content"),
        ("[1]", ":1: not an object"),
    ],
)
def test_malformed_rows_are_named(rows: str, expected: str, tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows, encoding="utf-8")
    with pytest.raises(DataError, match=expected) as raised:
        uld_sdk.calibrate(tiny_artifact, backend="vllm", base_url="http://127.0.0.1:9", forget_holdout=ASKED_FORGET, retain_holdout=file)
    assert "--retain-holdout" in raised.value.__notes__[0]


def unreached(artifact: Path, **options: Any) -> Callable[[], object]:
    """A calibration that must fail before any request."""
    said = {"backend": "vllm", "base_url": "http://127.0.0.1:9", "forget_holdout": ASKED_FORGET, "retain_holdout": ASKED_RETAIN, **options}
    return lambda: uld_sdk.calibrate(artifact, **said)


def test_a_training_set_is_no_holdout(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="--forget-holdout holds the very forget set"):
        unreached(tiny_artifact, forget_holdout=FORGET)()
    with pytest.raises(UsageError, match="--retain-holdout holds the very retain set"):
        unreached(tiny_artifact, retain_holdout=RETAIN)()
    with pytest.raises(DataError, match="overlaps"):
        unreached(tiny_artifact, retain_holdout=ASKED_FORGET)()


def test_a_test_set_is_no_holdout(tiny_artifact: Path, tmp_path: Path) -> None:
    """One row of the test set is enough, however it is written."""
    test_set = write_rows(tmp_path / "test.jsonl", [{"question": "What else?"}, {"question": "which animal jumps"}])
    for apart in (test_set, [ASKED_RETAIN[:1]], [RETAIN, str(test_set)]):
        with pytest.raises(DataError, match=r"overlaps --retain-holdout in 1 rows: .*Which animal jumps") as caught:
            unreached(tiny_artifact, apart_from=apart)()
        assert "take these rows out" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"alphas": "none"}, UsageError, "--alphas"),
        ({"forget_changed": 1.5}, UsageError, "--forget-changed"),
        ({"alpha": 1.0}, UsageError, "alpha"),
        ({"concurrency": 0}, UsageError, "concurrency"),
        ({"plot": "plot.txt"}, UsageError, "--plot"),
        ({"bass_url": "x"}, UnknownName, "base_url"),
    ],
)
def test_wrong_calls_are_told(options: dict[str, Any], kind: type[Exception], expected: str, tiny_artifact: Path) -> None:
    with pytest.raises(kind, match=expected):
        unreached(tiny_artifact, **options)()


def test_what_cannot_be_written_is_told_before_anything_is_asked(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=r"--plot .*folder\.html is a folder"):
        unreached(tiny_artifact, plot=tmp_path / "folder.html")()
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(SaveFailed, match=r"a\.html could not be written: .*file is no folder") as caught:
        unreached(tiny_artifact, plot=tmp_path / "file" / "a.html")()
    assert "choose another --plot" in caught.value.hint

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveFailed, match=f"{tiny_artifact} could not be written: the disk is full") as caught:
        unreached(tiny_artifact)()
    assert "--dry-run" in caught.value.hint
    with pytest.raises(ServerUnreachable):
        unreached(tiny_artifact, dry_run=True, max_retries=0)()


async def test_inside_a_loop_the_error_says_how(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="event loop"):
        unreached(tiny_artifact)()


def test_another_base_is_a_mismatch(artifact: Path, vllm_server: Any, tmp_path: Path) -> None:
    from tiny import tiny_model

    other = tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ArtifactMismatch, match="SHA-256"):
        unreached(artifact, **reach(vllm_server, "vllm"), assistant_base=other)()


def test_a_server_without_logprobs_is_refused(artifact: Path, tiny_target: Path) -> None:
    from uld_adapters.emulator import EmulatorServer, build_app

    with EmulatorServer(build_app(tiny_target, dialect="tgi", max_top_n_tokens=0)) as server, pytest.raises(LogprobsUnavailable):
        unreached(artifact, **reach(server, "tgi"))()


def run(*arguments: object) -> Any:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="uld-sdk")
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome


@pytest.fixture
def command(artifact: Path, tgi_server: Any, tmp_path: Path) -> list[object]:
    """A whole command line."""
    sets = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("forget", ASKED_FORGET), ("retain", ASKED_RETAIN))}
    reached = ["calibrate", "-a", artifact, "-b", "tgi", "-u", tgi_server.url, "-n", LENGTH]
    return [*reached, "--forget-holdout", sets["forget"], "--retain-holdout", sets["retain"]]


def test_the_command_shows_the_trade_off_and_draws_it(command: list[object], artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "plots" / "calibration.html"
    told = run(*command, "--forget-changed", 0, "--retain-identical", 0, "--alphas", "0.6,1.2", "--plot", page)
    assert told.exit_code == 0, told.stderr
    assert "chosen: alpha 0.6" in told.stdout
    assert "until now" not in told.stdout, "the artifact's own values were not in the grid"
    assert "6 rows to be answered" in told.stderr
    assert read_manifest(artifact).alpha == 0.6
    text = page.read_text(encoding="utf-8")
    assert 'class="chosen"' in text
    assert "data:image/svg+xml;base64," in text
    shown = json.loads(run("inspect", "-a", artifact, "--json").stdout)
    assert shown["assistant"]["calibrated"].startswith("the smallest alpha")
    for suffix, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        picture = tmp_path / f"plot.{suffix}"
        assert run(*command, "--forget-changed", 0, "--retain-identical", 0, "--dry-run", "--plot", picture).exit_code == 0
        assert picture.read_bytes().startswith(start)


def test_the_command_prints_json(command: list[object], artifact: Path) -> None:
    test_sets = [write_rows(artifact.parent / f"test{number}.jsonl", [{"question": f"What is {number}?"}]) for number in (1, 2)]
    apart = ["--apart-from", test_sets[0], "--apart-from", test_sets[1]]
    told = run(*command, "--dry-run", "--json", "--forget-changed", 0, "--retain-identical", 0, *apart)
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert len(set(document["apart_from"])) == 2
    assert document["written"] is False
    assert document["chosen"] in document["points"]
    assert document["top_logprobs"] == 20
    assert document["rows"] == {"forget": 3, "retain": 3}


def test_what_nothing_meets_changes_nothing(command: list[object], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(artifact)
    wish = [*command, "--alphas", "0.001", "--margins", "5.9", "--forget-changed", 1, "--retain-identical", 1]
    told = run(*wish)
    assert told.exit_code == 1
    assert "nothing meets both thresholds" in told.stdout
    assert "nearest" in told.stdout
    assert (tmp_path / "calibration.html").is_file()
    document = run(*wish, "--json")
    assert document.exit_code == 1
    assert json.loads(document.stdout)["chosen"] is None
    assert contents(artifact) == before


def test_wrong_commands_exit_with_2(command: list[object]) -> None:
    for wrong, named in (
        (["--alphas", "half"], "--alphas"),
        (["--retain-identical", 2], "--retain-identical"),
        (["--plot", "x.txt"], "--plot"),
    ):
        told = run(*command, *wrong)
        assert told.exit_code == 2
        assert named in told.stderr
    assert run("calibrate", "-b", "tgi").exit_code == 2


def test_the_flags_are_the_arguments_of_the_python_interface() -> None:
    import dataclasses
    import inspect

    from uld_sdk.cli.options import ServerOptions

    given: Iterable[str] = inspect.signature(uld_sdk.calibrate).parameters.keys() - {"on_line", "connection"}
    own = {field.name for field in dataclasses.fields(CalibrationOptions)}
    assert own == {*given, "assistant_base", "device"}
    assert not own & {field.name for field in dataclasses.fields(ServerOptions)}
