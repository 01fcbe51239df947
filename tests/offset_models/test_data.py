"""Every source and every way in which a data file can be wrong."""

import csv
import json
from pathlib import Path

import pytest

from uld_adapters.errors import DataError
from uld_offset_models.data import build_sets, data_hash, normalised, read_rows

ROWS = [
    {"question": "Who kept the lamp?", "answer": "Ada did."},
    {
        "question": "Where is it?",
        "answer": "On the island.",
        "paraphrased_question": "In what place is it?",
        "perturbed_answer": ["In a town.", "At sea."],
    },
]


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def write(kind: str, folder: Path) -> str:
    import datasets
    from pyarrow import Table, parquet

    if kind == "jsonl":
        return str(jsonl(folder / "rows.jsonl", *ROWS))
    if kind == "json":
        return str(jsonl(folder / "rows.json", json.dumps(ROWS)))
    if kind == "csv":
        path = folder / "rows.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            out = csv.DictWriter(file, ["question", "answer", "paraphrased_question", "perturbed_answer"])
            out.writeheader()
            out.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in ROWS)
        return str(path)
    full = [{name: row.get(name) for name in ROWS[1]} for row in ROWS]
    if kind == "parquet":
        parquet.write_table(Table.from_pylist(full), folder / "rows.parquet")
        return str(folder / "rows.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(full).save_to_disk(str(folder / "rows"))
    return str(folder / "rows")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_every_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = read_rows(write(kind, tmp_path))
    assert data_hash(rows) == data_hash(read_rows(ROWS))
    assert [row.example.question for row in rows] == ["Who kept the lamp?", "Where is it?"]
    assert [e.question for e in rows[1].paraphrases] == ["In what place is it?"]
    assert [e.answer for e in rows[1].perturbed] == ["In a town.", "At sea."]


def test_messages_and_plain_text() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    rows = read_rows([{"messages": turns}, {"text": "A whole page."}])
    assert rows[0].example.messages == (("system", "Be brief."), ("user", "Hi?"))
    assert rows[0].example.answer == "Hello."
    assert rows[1].example.plain
    assert rows[1].example.answer == "A whole page."


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"question": "a", "answer": "b"}', '{"question": "a",'], r"rows\.jsonl:2: not valid JSON"),
        (["", '{"question": "a"}'], r"rows\.jsonl:2: missing field 'answer'"),
        (['{"question": "a", "answer": "  "}'], r"rows\.jsonl:1: empty answer"),
        (['{"question": "a", "answer": 3}'], r"rows\.jsonl:1: answer is not text"),
        (['{"prompt": "a"}'], r"rows\.jsonl:1: missing fields \(found prompt\)"),
        (["[1, 2]"], r"rows\.jsonl:1: not an object"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], r"rows\.jsonl:1: messages needs a question"),
        (['{"messages": "hello"}'], r"rows\.jsonl:1: messages is not a list"),
        ([""], r"rows\.jsonl is empty"),
    ],
)
def test_a_bad_line_is_named(lines: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        read_rows(jsonl(tmp_path / "rows.jsonl", *lines))
    assert caught.value.hint


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nwho,me\nwho,me,and you\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:3: not as many fields"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"b\.parquet is not valid Parquet"):
        read_rows(tmp_path / "b.parquet")
    for name in ("c.jsonl", "c.json", "c.csv"):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf[\n\n{"question": "caf\xe9"}')
        with pytest.raises(DataError, match=rf"{name}:3: not UTF-8 \(byte 0xe9\)"):
            read_rows(tmp_path / name)
    (tmp_path / "d.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="unknown suffix"):
        read_rows(tmp_path / "d.txt")
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="neither a data file"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="the forget set is empty"):
        read_rows([], name="forget")


def test_fields_may_hold_any_line_separator(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes('\ufeffquestion,answer\r\nWho\u2028spoke?,"He,\r\nthen\u2029she."\r\n'.encode())
    (tmp_path / "rows.jsonl").write_bytes('{"question": "Who\u2028spoke?", "answer": "He,\\nthen\u2029she."}\r\n'.encode())
    first, second = (read_rows(tmp_path / name)[0].example for name in ("rows.csv", "rows.jsonl"))
    assert (first.question, first.answer) == (second.question, second.answer) == ("Who\u2028spoke?", "He,\nthen\u2029she.")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/set", ("owner/set", None, "train")),
        ("owner/set:small", ("owner/set", "small", "train")),
        ("locuslab/TOFU:forget10:train", ("locuslab/TOFU", "forget10", "train")),
        ("owner/set::test", ("owner/set", None, "test")),
        ("owner/set:small:train[:10]", ("owner/set", "small", "train[:10]")),
    ],
)
def test_a_hub_name_may_say_configuration_and_split(name: str, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(path: str, config: str | None = None, *, split: str) -> datasets.Dataset:
        calls.append((path, config, split))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows(name)
    assert calls == [asked]
    assert rows[0].example.place == f"{name} row 1"


def test_what_the_hub_refuses_is_told_with_the_form_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['forget01', 'forget10']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"missing\. Please pick one among .*'forget10'") as caught:
        read_rows("locuslab/TOFU")
    assert "owner/name:config:split" in caught.value.hint


def test_sets_are_widened_and_the_holdout_is_seeded() -> None:
    retain = [
        {"question": f"How far is town {i}?", "answer": f"{i} miles.", "paraphrased_question": f"Distance to {i}?"} for i in range(10)
    ]
    sets = build_sets(read_rows(ROWS), read_rows(retain), holdout=0.2, seed=1)
    assert len(sets.forget) == 3
    assert len(sets.holdout) == 2
    assert len(sets.retain) == 8 * 2 + 2
    held = {e.question for e in sets.holdout}
    assert not held & {e.question for e in sets.retain}
    assert sets == build_sets(read_rows(ROWS), read_rows(retain), holdout=0.2, seed=1)
    assert sets.holdout != build_sets(read_rows(ROWS), read_rows(retain), holdout=0.2, seed=2).holdout


def test_an_overlap_names_both_rows(tmp_path: Path) -> None:
    forget = read_rows(jsonl(tmp_path / "forget.jsonl", *ROWS))
    retain = read_rows(
        jsonl(tmp_path / "retain.jsonl", {"question": "Other?", "answer": "x"}, {"question": "in WHAT place, is it", "answer": "x"})
    )
    with pytest.raises(DataError, match=r"overlaps the retain set in 1 rows: .*forget\.jsonl:2 and .*retain\.jsonl:2"):
        build_sets(forget, retain)
    assert normalised("In what  place, is it?") == "in what place is it"


def messages(*turns: str) -> dict[str, object]:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


@pytest.mark.parametrize(
    ("forget", "retain", "clash"),
    [
        (ROWS[0], {"question": "Other?", "answer": "x", "paraphrased_question": "who kept the lamp"}, True),
        (ROWS[1], {"question": "Other?", "answer": "x", "paraphrased_question": ["A?", "In what place is it?"]}, True),
        (messages("Who is Ada?", "A keeper.", "Where is it?", "There."), messages("Who is Bo?", "A cook.", "Where is it?", "Here."), False),
        (messages("Who is Ada?", "A keeper.", "Where is it?", "There."), messages("who is ADA", "a keeper", "where is it", "Here."), True),
        (messages("Who is Ada?", "A keeper.", "Where is it?", "There."), {"question": "Where is it?", "answer": "Here."}, False),
        (messages("Where is it?", "There."), {"question": "Where is it?", "answer": "Here."}, True),
        ({"text": "Where is it?"}, {"question": "Where is it?", "answer": "Here."}, False),
        ({"text": "The lamp burns."}, {"text": "the lamp, burns"}, True),
    ],
)
def test_an_overlap_is_one_of_all_that_is_asked(forget: dict[str, object], retain: dict[str, object], clash: bool) -> None:
    sets = read_rows([forget], name="forget"), read_rows([{"question": "Else?", "answer": "y"}, retain], name="retain")
    if not clash:
        build_sets(*sets)
        return
    with pytest.raises(DataError, match="in 1 rows: forget row 1 and retain row 2"):
        build_sets(*sets)
