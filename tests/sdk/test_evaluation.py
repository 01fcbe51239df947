"""Figures of an evaluation: ROUGE-L recall, loops, and the summary over answers."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rouge_score")
pytest.importorskip("matplotlib")

from uld_sdk.evaluation.answers import Answered, TokenStep, summarise
from uld_sdk.evaluation.loops import count_loops, loops
from uld_sdk.evaluation.report import render
from uld_sdk.evaluation.rouge import mean, rouge_l_recall


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat on the mat", "the cat lay on a mat", 4 / 6),  # the, cat, on, mat
        ("a b c d", "d c b a", 1 / 4),  # order counts
        ("one two three four", "one x two y three", 3 / 4),  # gaps do not
        ("He discovered gravity.", "he DISCOVERING gravity", 1.0),  # case, points and Porter stems do not count
        ("Newton was born", "Newton was born in 1643 in England", 1.0),  # recall, so length of the answer does not count
        ("two words", "", 0.0),
        ("", "", 1.0),
        ("", "words", 0.0),
    ],
)
def test_rouge_l_recall_by_hand(reference: str, answer: str, recall: float) -> None:
    assert rouge_l_recall(reference, answer) == pytest.approx(recall)


def slow_lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + slow_lcs(a[:-1], b[:-1])
    return max(slow_lcs(a[:-1], b), slow_lcs(a, b[:-1]))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_rouge_equals_a_slow_reference(reference: list[str], answer: list[str]) -> None:
    assert rouge_l_recall(" ".join(reference), " ".join(answer)) == pytest.approx(slow_lcs(reference, answer) / len(reference))


def test_an_answer_loops_when_a_4_gram_comes_over_three_times() -> None:
    assert not loops([1, 2, 3, 4] * 3)
    assert loops([1, 2, 3, 4] * 4)
    assert not loops([7] * 6)  # the 4-gram 7777 three times, overlapping
    assert loops([7] * 7)
    assert not loops([])
    assert not loops(list(range(100)))
    assert count_loops([[7] * 7, [1], [1, 2, 3, 4] * 4]) == 2


def test_the_mean_of_nothing_is_not_a_number() -> None:
    assert mean([1.0, 3.0]) == 2.0
    assert mean([]) != mean([])


def row(kind: str, part: str, before: str, after: str, *, name: str = "x", requests: int = 1, neighbour: bool = False) -> Answered:
    """An answer whose token ids are its characters."""
    same = before == after
    steps = tuple(
        TokenStep(character, character if same else "§", 0.02 if same else 0.9, 0.4 if same else 9.0, touched=not same, changed=not same)
        for character in after
    )
    timed = 2.0 if part == "holdout" else None
    return Answered(
        name, kind, part, neighbour, f"<{name}> & co?", before, after, tuple(map(ord, before)), tuple(map(ord, after)), untouched=same,
        requests=requests, changed=0 if same else len(after), positions=len(after), seconds=3.0, seconds_first=0.2, plain_seconds=timed,
        plain_seconds_first=timed and 0.1, steps=steps,
    )  # fmt: skip


ROWS = [
    row("forget", "train", "one two", "three"),
    row("forget", "holdout", "one two three four", "one five", requests=5),
    row("retain", "train", "same", "same"),
    row("retain", "holdout", "same words", "same words"),
    row("retain", "holdout", "more words", "more", neighbour=True, requests=2),
]


def test_the_summary_by_hand() -> None:
    found = summarise(ROWS)
    assert found["forget_rouge"] == {"train": 0.0, "holdout": 0.25}
    assert found["retain_rouge"] == {"train": 1.0, "holdout": 0.75}
    assert found["forget_unchanged"] == {"train": 0, "holdout": 0}
    assert found["retain_identical"] == 0.5
    assert found["retain_untouched"] == 0.5
    assert found["retain_identical_neighbours"] == 0.0
    assert found["requests_per_answer"] == {"forget": 5.0, "retain": 1.5}
    assert found["wall_ratio"] == 1.5
    assert found["first_token_ratio"] == 2.0
    assert (found["loops_before"], found["loops_after"]) == (0, 0)
    assert found["untouched_but_different"] == 0
    assert found["answers"] == {"forget_train": 1, "forget_holdout": 1, "retain_train": 1, "retain_holdout": 2}


def test_a_false_proof_would_be_counted() -> None:
    broken = replace(ROWS[4], untouched=True)
    assert summarise([*ROWS[:4], broken])["untouched_but_different"] == 1


class Outside(HTMLParser):
    """Collects whatever a page would load from elsewhere, and checks that tags close."""

    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("data:")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


SETTINGS = {
    "topic": "Isaac <Newton>", "model": "m", "server": "s", "top_logprobs": 20, "method": "uld", "preset": "gated", "alpha": 0.75,
    "margin": 3.0,
}  # fmt: skip


def report() -> dict[str, object]:
    return {
        **summarise(ROWS),
        "training_seconds": 27.0,
        "training_history": [
            {"step": 1, "remember": 9.0, "uniform": 0.2},
            {"step": 2, "remember": 2.0, "uniform": 0.1, "retain_untouched": 1.0},
        ],
        "settings": SETTINGS,
        "versions": {"python": "3.11"},
        "created": "2026-01-01",
        "rows": [answer.to_dict() for answer in ROWS],
    }


def test_the_page_stands_alone_and_escapes_what_models_write() -> None:
    page = render(report())
    outside = Outside()
    outside.feed(page)
    assert outside.loads == []
    assert outside.open == []
    assert page.count("data:image/svg+xml") == 4
    assert "<x>" not in page
    assert "Isaac &lt;Newton&gt;" in page
    assert "peak 9.0 nats" in page
    assert not re.search(r"\$[a-z_]+", page)


def test_the_page_of_pairs_compares_them_and_has_their_targets() -> None:
    lines = [{"variant": "ULD", "forget_rouge": 0.2}, {"variant": "offset <gated>", "forget_rouge": 0.4}]
    history = [{"step": 1, "forget": 9.0, "retain": 0.2}, {"step": 2, "forget": 2.0, "retain": 0.1, "retain_untouched": 1.0}]
    page = render({**report(), "settings": {**SETTINGS, "method": "offset"}, "compared": lines, "training_history": history})
    outside = Outside()
    outside.feed(page)
    assert outside.open == []
    assert "Beside each other" in page
    assert "offset &lt;gated&gt;" in page
    assert "target: at most 0.60" in page
    assert "Beside each other" not in render(report())


def test_the_page_of_an_assistant_without_gate() -> None:
    plain = report()
    rows = json.loads(json.dumps(plain["rows"]))
    for answer in rows:
        for step in answer["steps"]:
            step["gate"] = None
    assert "<h2>" in render({**plain, "rows": rows, "retain_identical_neighbours": None})
