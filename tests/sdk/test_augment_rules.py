"""The checks of augmentation, how replies are read, and the rules of `--offline`, in Python and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tiny_rows import FORGET, RETAIN, write_rows
from uld_offset_models.data import build_sets, normalised, read_rows
from uld_sdk import augment
from uld_sdk.augmentation.checks import ForgetQuestions, refused_paraphrase, refused_wrong_answer
from uld_sdk.augmentation.prompts import listed
from uld_sdk.augmentation.words import content, known_names, name_spans, names, numbers
from uld_sdk.cli import app

PEOPLE = [
    {"question": "When was Isaac Newton born?", "answer": "Isaac Newton was born on 25 December 1642."},
    {"question": "Who published the Principia?", "answer": "Newton published it in London in 1687."},
    {"question": "What is the home of Newton?", "answer": "Woolsthorpe."},
    {"question": "Does the apple fall?", "answer": "Yes."},
]
KNOWN = known_names(text for row in PEOPLE for text in row.values())


def test_names_are_read_from_capitals() -> None:
    assert names("When was Isaac Newton's brother in Paris?") == {"isaac", "newton", "paris"}
    assert names("Describe it. I think Newton-John sang; Then he left.") == {"newton-john"}
    assert names("Newton fell.") == set()
    assert names("Newton fell.", KNOWN) == {"newton"}
    assert names("Woolsthorpe.") == {"woolsthorpe"}
    assert [span.text for span in name_spans("So Isaac Newton's apple met Paris.")] == ["Isaac Newton", "Paris"]


def test_numbers_have_one_form() -> None:
    assert numbers("Two of 1,000 apples, 3.5 kg, twenty times") == {"2", "1000", "3.5", "20"}
    assert content("What are the two moons of it?") == {"2", "moons"}


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("In which year was Isaac Newton born?", None),
        ("When was Isaac born?", "a name is lost"),
        ("When was Isaac Newton, brother of Hannah, born?", "a name is added"),
        ("Was Isaac Newton born in 1700?", "a number is added"),
        ("Was it in 1642 that Isaac Newton was born?", None),
        ("when was isaac newton born", "the source itself"),
        ("?!", "empty"),
        ("Isaac Newton " * 100, "too long"),
    ],
)
def test_a_paraphrase_keeps_numbers_and_names(candidate: str, reason: str | None) -> None:
    row = PEOPLE[0]
    assert refused_paraphrase(candidate, row["question"], row=" ".join(row.values()), known=KNOWN) == reason


def test_a_paraphrased_answer_keeps_its_numbers() -> None:
    row = PEOPLE[0]
    told = {"source": row["answer"], "row": " ".join(row.values()), "known": KNOWN}
    assert refused_paraphrase("Isaac Newton's birth was in December 1642.", **told) == "a number is lost"
    assert refused_paraphrase("It was 25 December 1642 when Isaac Newton was born.", **told) is None
    assert refused_paraphrase("The planet has 2 moons.", "There are two moons.", row="How many moons? There are two moons.") is None


@pytest.mark.parametrize(
    ("row", "candidate", "reason"),
    [
        (0, "Isaac Newton was born on 25 December 1700.", None),
        (0, "isaac newton was born on 25 December, 1642", "the right answer"),
        (0, "On 25 December 1642 he was born.", "the same in substance"),
        (0, "He was not born on 25 December 1642.", "the same in substance"),
        (0, "Isaac Newton was born.", "the same in substance"),
        (1, "Newton published it in Paris in 1687.", None),
        (2, "It is in Woolsthorpe.", "the same in substance"),
        (2, "Cambridge.", None),
        (3, "No.", None),
        (3, "Yes, it does.", "the same in substance"),
        (3, "...", "empty"),
    ],
)
def test_a_wrong_answer_differs_in_substance(row: int, candidate: str, reason: str | None) -> None:
    assert refused_wrong_answer(candidate, PEOPLE[row]["answer"], question=PEOPLE[row]["question"], known=KNOWN) == reason


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("Who was Isaac Asimov?", None),
        ("Where is Newton in Massachusetts?", None),
        ("When was Isaac Newton born", "no question"),
        ("WHEN was Isaac Newton born?", "a forget question"),
        ("Where was Isaac Newton born?", "too near to a forget question"),
        ("In what hour of the night was the great physicist Isaac Newton really born?", "too near to a forget question"),
        ("Really " * 200 + "?", "too long"),
    ],
)
def test_a_neighbour_is_no_forget_question(candidate: str, reason: str | None) -> None:
    assert ForgetQuestions(row["question"] for row in PEOPLE).refused(candidate) == reason


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ("Here are two:\n1. One way?\n2) Another?\nI hope this helps!", ["One way?", "Another?"]),
        ('- "Quoted?"\n* **Bold?**\n• “Curled?”', ["Quoted?", "Bold?", "Curled?"]),
        ("Sure, here they are:\n\nPlain?\nQuestion: Labelled?", ["Plain?", "Labelled?"]),
        ('"Both" and "each"', ['"Both" and "each"']),
        ("1642 was the year.", ["1642 was the year."]),
        ("", []),
    ],
)
def test_replies_are_read_line_by_line(reply: str, texts: list[str]) -> None:
    assert listed(reply) == texts


@given(st.text())
def test_any_reply_can_be_read_and_judged(reply: str) -> None:
    forget = ForgetQuestions([PEOPLE[0]["question"]])
    for text in [reply, *listed(reply), *listed(reply, cut=True)]:
        for row in PEOPLE:
            refused_paraphrase(text, row["question"], row=" ".join(row.values()), known=KNOWN)
            refused_wrong_answer(text, row["answer"], question=row["question"], known=KNOWN)
        forget.refused(text)


def offline(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    augment(forget=rows, output=folder / "f.jsonl", retain_out=folder / "r.jsonl", offline=True, overwrite=True, **options)
    return tuple([json.loads(line) for line in (folder / name).read_text().splitlines()] for name in ("f.jsonl", "r.jsonl"))


@pytest.mark.parametrize("rows", [FORGET, PEOPLE], ids=["tiny", "people"])
def test_rules_pass_their_own_checks(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    wide, kept = offline(tmp_path, rows, paraphrases=3, wrong=2, neighbours=3, retain=RETAIN)
    known = known_names(text for row in rows for text in row.values())
    for row, source in zip(wide, rows, strict=True):
        both = f"{source['question']} {source['answer']}"
        for field in ("question", "answer"):
            texts = row[f"paraphrased_{field}"]
            assert len({normalised(text) for text in (*texts, source[field])}) == 4, "never the source itself, and none twice"
            assert not any(refused_paraphrase(text, source[field], row=both, known=known) for text in texts)
        assert len(row["perturbed_answer"]) == 2
        assert normalised(source["answer"]) not in {normalised(text) for text in row["perturbed_answer"]}
    assert len(kept) == len(RETAIN) + 3 * len(rows)
    sets = build_sets(read_rows(tmp_path / "f.jsonl"), read_rows(tmp_path / "r.jsonl"))
    assert len(sets.forget) == 7 * len(rows)


def test_rules_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, second, other = (offline(tmp_path, PEOPLE, seed=seed, neighbours=2) for seed in (1, 1, 2))
    assert first == second != other


def test_rules_turn_questions_into_clauses_and_swap_what_is_told(tmp_path: Path) -> None:
    wide, kept = offline(tmp_path, PEOPLE, paraphrases=4, wrong=3, neighbours=4)
    assert "Tell me when Isaac Newton was born." in wide[0]["paraphrased_question"]
    assert "Tell me who published the Principia." in wide[1]["paraphrased_question"]
    assert "Tell me what the home of Newton is." in wide[2]["paraphrased_question"]
    assert set(wide[2]["perturbed_answer"]) <= {
        "Isaac Newton.",
        "Newton.",
        "London.",
        "December.",
        "Principia.",
        *(r["answer"] for r in PEOPLE),
    }
    spelled = {row["question"]: row["answer"] for row in kept}
    letters = {question: answer for question, answer in spelled.items() if question.startswith("How many letters")}
    assert all(f" {len(question.split(chr(34))[1])} letters" in answer for question, answer in letters.items())


def invoke(*arguments: object, **env: str) -> Any:
    outcome = CliRunner().invoke(app, ["augment", *(str(argument) for argument in arguments)], prog_name="uld-sdk", env=env)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    assert "Traceback" not in outcome.stderr
    return outcome


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "forget.jsonl", FORGET)


def test_the_command_offline(forget: Path, tmp_path: Path) -> None:
    told = invoke("--forget", forget, "-o", tmp_path / "f2.jsonl", "--retain-out", tmp_path / "r2.jsonl", "--offline", "--json")
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["rows"] == document["retain_rows"] == len(FORGET)
    assert {kind: count["left_out"] for kind, count in document["counts"].items()} == dict.fromkeys(document["counts"], 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f2.jsonl", "forget.jsonl", "r2.jsonl"], "no cache, no parts"
    again = invoke("--forget", forget, "-o", tmp_path / "f2.jsonl", "--offline")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    shown = invoke("--forget", forget, "-o", tmp_path / "f2.jsonl", "--offline", "--overwrite", "--no-wrong", "--paraphrases", 1)
    assert shown.exit_code == 0, shown.stderr
    assert "paraphrased question" in shown.stdout
    assert "perturbed" not in shown.stdout
    assert all("perturbed_answer" not in row for row in map(json.loads, (tmp_path / "f2.jsonl").read_text().splitlines()))


def test_the_command_asks_a_server(forget: Path, tmp_path: Path, vllm_server: Any, tiny_target: Path) -> None:
    """A random model says nothing of use: all is asked, refused, counted and left out, and the second time not even asked."""
    command = ["--forget", forget, "-o", tmp_path / "f2.jsonl", "-b", "vllm", "-u", vllm_server.url, "--tokenizer", tiny_target]
    command += ["-n", 12, "--tries", 2, "--paraphrases", 1, "--wrong", 1, "--overwrite", "--json"]
    first, second = (json.loads(invoke(*command, ULD_ASSISTANT="not-used").stdout) for _ in range(2))
    assert (first["asked"], first["cached"]) == (second["cached"], second["asked"])
    assert first["asked"] >= 3 * len(FORGET)
    assert first["counts"] == second["counts"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["--offline", "--backend"]),
        (["--offline", "--paraphrases", "3", "--no-paraphrases"], 2, ["contradict"]),
        (["--offline", "--neighbours", "2"], 2, ["--retain-out"]),
        (["--offline", "--wrong", "-1"], 2, ["--wrong"]),
        (["--offline", "--forget", "missing.jsonl"], 1, ["missing.jsonl does not exist"]),
        (["--offline", "--forget", "torn.jsonl"], 1, ["torn.jsonl:2: not valid JSON"]),
        (["-b", "vllm", "-u", "http://127.0.0.1:9", "--max-retries", "0"], 1, ["no server answers"]),
    ],
)
def test_a_wrong_command_says_so(
    forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.jsonl").write_text(json.dumps(FORGET[0]) + "\n{torn\n", encoding="utf-8")
    told = invoke("--forget", forget, "-o", "f2.jsonl", *arguments)
    assert told.exit_code == code, told.stderr
    assert told.stdout == ""
    assert all(word in told.stderr for word in words), told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forget.jsonl", "torn.jsonl"]
