"""Augmentation from a scripted server: what is kept, what is refused, what is asked again, and what the cache saves."""

import asyncio
import json
import stat
import zlib
from pathlib import Path
from typing import Any

import pytest

import tiny
from scripted import Script, Scripted
from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.errors import DataError, RequestRejected, SaveFailed, UsageError
from uld_offset_models.data import build_sets, normalised, read_rows
from uld_sdk import AugmentResult, augment
from uld_sdk.augmentation.prompts import wording

RIVER = FORGET[0]["question"]
OFF = {"paraphrases": 0, "wrong": 0}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "forget.jsonl", FORGET)


def asked_for(prompt: str) -> tuple[str, str, str]:
    """Which of our prompts it is ("" for a plain question), and the question and answer in it."""
    kind = next((kind for kind, words in wording("prompts").items() if prompt.startswith(words.partition("{n}")[0])), "")
    kinds = [k for k, words in wording("prompts").items() if kind and prompt.startswith(words.partition("{n}")[0])]
    if len(kinds) > 1:  # prompts that begin alike differ after the number
        kind = next(k for k in kinds if wording("prompts")[k].partition("{n}")[2].partition("\n")[0] in prompt)
    question = prompt.partition("Question: ")[2].partition("\n")[0]
    return kind, question or prompt, prompt.rpartition("nswer: ")[2]


def good(prompt: str, turn: int) -> str:
    """Two replies that pass every check, for any row."""
    kind, question, answer = asked_for(prompt)
    mark = zlib.crc32(question.encode()) % 10_000
    match kind:
        case "paraphrased_question":
            return f"Sure:\n1. Tell me this. {question}\n2. Do you know this? {question}"
        case "paraphrased_answer":
            return f"- In short: {answer}\n- As is known: {answer}"
        case "perturbed_answer":
            return '1. "It is called the Danube."\n2. It is called the Elbe.'
        case "neighbour_sense" | "neighbour_field" | "neighbour_people":
            return f"What weighs {mark} stones?\nWhat is {mark} {kind.replace('_', ' ')}?"
    return f"The answer is {mark}."


def instead(script: dict[str, list[str]]) -> Script:
    """The good replies, but for some kinds about the river: these, in turn."""

    def reply(prompt: str, turn: int) -> str:
        kind, question, _ = asked_for(prompt)
        if kind in script and question == RIVER:
            return script[kind][min(turn, len(script[kind]) - 1)]
        return good(prompt, turn)

    return reply


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(backend: Scripted, forget: Any, folder: Path, **options: Any) -> AugmentResult:
    return augment(forget=forget, output=folder / "out.jsonl", backend=backend, overwrite=True, **options)


def test_every_kind_goes_where_training_reads_it(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    retain = write_rows(tmp_path / "retain.jsonl", RETAIN)
    result = run(Scripted(tokenizer, good), forget, tmp_path, retain=retain, retain_out=tmp_path / "kept.jsonl", neighbours=2)
    assert result.retain_path is not None
    assert [result.rows, result.retain_rows] == [len(FORGET), len(RETAIN) + 2 * len(FORGET)]
    assert {kind: (count.wanted, count.kept, count.left_out) for kind, count in result.counts.items()} == dict.fromkeys(
        ["paraphrased_question", "paraphrased_answer", "perturbed_answer", "neighbour"], (8, 8, 0)
    )
    row = written(result.path)[0]
    assert row["paraphrased_question"] == [f"Tell me this. {RIVER}", f"Do you know this? {RIVER}"]
    assert row["perturbed_answer"] == ["It is called the Danube.", "It is called the Elbe."]
    kept = written(result.retain_path)
    assert kept[: len(RETAIN)] == RETAIN
    assert all(row["answer"].startswith("The answer is ") and row["neighbour"] for row in kept[len(RETAIN) :])
    for path in (result.path, result.retain_path, tmp_path / "out.jsonl.cache"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    sets = build_sets(read_rows(result.path), read_rows(result.retain_path))
    assert len(sets.forget) == len(FORGET) * (1 + 2 + 2)
    assert len(sets.retain) == result.retain_rows + 2 * len(FORGET)


@pytest.mark.parametrize("paraphrases", [0, 2])
@pytest.mark.parametrize("wrong", [0, 2])
def test_the_four_cells_of_the_ablation(tokenizer: Any, tmp_path: Path, paraphrases: int, wrong: int) -> None:
    """0 also leaves out what the input brings; what it brings counts towards what is wanted."""
    rows = [{**FORGET[0], "id": 7, "paraphrased_questions": ["How is the river called?"], "perturbed_answer": "It is called the Rhine."}]
    backend = Scripted(tokenizer, good)
    result = run(backend, rows, tmp_path, paraphrases=paraphrases, wrong=wrong)
    (row,) = written(result.path)
    assert row["id"] == 7
    assert len(row.get("paraphrased_question", [])) == len(row.get("paraphrased_answer", [])) == paraphrases
    assert len(row.get("perturbed_answer", [])) == wrong
    assert "paraphrased_questions" not in row
    assert backend.asked.total() == (2 if paraphrases else 0) + (1 if wrong else 0)
    sets = build_sets(read_rows(result.path), read_rows(RETAIN))
    assert (len(sets.forget), len(sets.retain)) == (1 + 2 * paraphrases, len(RETAIN) + wrong)


def test_the_checks_refuse_and_what_they_refuse_is_asked_again(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    script = {
        "paraphrased_question": [
            f"1. {RIVER}\n2. How is the river called?\n3. how is the river CALLED\n4. What did the river do in 1812?\n5. Is it the Rhine?",
            "1. How is the river called?\n2. Where does the river run?\n3. Which name does the river have?",
        ],
        "paraphrased_answer": ["Its name is well known.\nPeople call it the Amber."],
        "perturbed_answer": ["The Amber it is called.\nIt is the Amber, they say.\nIt is called the Rhine.\nPeople call it the Amber."],
    }
    backend = Scripted(tokenizer, instead(script))
    result = run(backend, forget, tmp_path)
    row = written(result.path)[0]
    assert row["paraphrased_question"] == ["How is the river called?", "Which name does the river have?"]
    assert row["paraphrased_answer"] == ["People call it the Amber."]
    assert row["perturbed_answer"] == ["It is called the Rhine."]
    assert result.counts["paraphrased_question"].refused == {
        "a duplicate": 3,
        "a name is added": 1,
        "a number is added": 1,
        "the source itself": 1,
    }
    assert result.counts["paraphrased_answer"].refused == {"a duplicate": 2, "a name is lost": 3}
    assert result.counts["perturbed_answer"].refused == {"a duplicate": 2, "the same in substance": 9}
    assert [count.left_out for count in result.counts.values()] == [0, 1, 1]
    most = {kind: count for prompt, count in backend.asked.items() for kind, question, _ in [asked_for(prompt)] if question == RIVER}
    assert most == {"paraphrased_question": 2, "paraphrased_answer": 3, "perturbed_answer": 3}, "three tries at most"


def test_neighbours_are_questions_and_none_of_the_forget_set(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": RIVER, "answer": "It is called the Amber."}, {"question": "Where was Ada Lovelace born?", "answer": "In London."}]
    retain = [{"question": "Who was Isaac Asimov?", "answer": "A writer."}]
    lines = [RIVER, "When was Ada Lovelace born, please?", "Ada Lovelace was a mathematician.", "who was isaac asimov?", "What is amber?"]

    def script(prompt: str, turn: int) -> str:
        kind, question, _ = asked_for(prompt)
        return "\n".join(lines) if kind else "" if question == "What is amber?" else good(prompt, turn)

    given = {**OFF, "retain": retain, "retain_out": tmp_path / "kept.jsonl", "neighbours": 1, "tries": 2}
    result = run(Scripted(tokenizer, script), rows, tmp_path, **given)
    refused = {"a duplicate": 3, "a forget question": 3, "no answer": 1, "no question": 3, "too near to a forget question": 3}
    found = result.counts["neighbour"]
    assert (found.wanted, found.kept, found.left_out, dict(found.refused)) == (2, 0, 2, {**refused, "a duplicate": 5})
    assert written(tmp_path / "kept.jsonl") == retain


def test_the_cache_answers_a_second_run(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    first, second, other = (Scripted(tokenizer, good, model=model) for model in ("script", "script", "another"))
    given = {"retain_out": tmp_path / "kept.jsonl", "neighbours": 2}
    result = run(first, forget, tmp_path, **given)
    before = [path.read_bytes() for path in (tmp_path / "out.jsonl", tmp_path / "kept.jsonl")]
    assert (result.asked, result.cached) == (first.asked.total(), 0)
    again = run(second, forget, tmp_path, **given)
    assert (second.asked.total(), again.asked, again.cached) == (0, 0, result.asked)
    assert [path.read_bytes() for path in (tmp_path / "out.jsonl", tmp_path / "kept.jsonl")] == before
    assert run(other, forget, tmp_path, **given).asked == result.asked, "another model gives other replies"


def test_an_interrupted_run_goes_on_where_it_was(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    whole = Scripted(tokenizer, good)
    expected = run(whole, forget, tmp_path / "whole", concurrency=2)
    broken = Scripted(tokenizer, good, fails_after=5)  # one at a time: others on their way would be lost
    with pytest.raises(RequestRejected, match="the script has ended") as raised:
        run(broken, forget, tmp_path, concurrency=1)
    assert "goes on from there" in raised.value.__notes__[0]
    assert not (tmp_path / "out.jsonl").exists()
    cache = tmp_path / "out.jsonl.cache"
    kept = cache.read_bytes()
    assert kept.count(b"\n") == broken.asked.total() == 5
    cache.write_bytes(kept[:-20])  # a line that was torn is asked for again
    rest = Scripted(tokenizer, good)
    result = run(rest, forget, tmp_path, concurrency=2)
    assert (result.asked, result.cached) == (whole.asked.total() - 4, 4)
    assert result.path.read_bytes() == expected.path.read_bytes()
    assert run(Scripted(tokenizer, good), forget, tmp_path).asked == 0


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_at_a_time_are_bounded_and_change_nothing(tokenizer: Any, forget: Path, tmp_path: Path, concurrency: int) -> None:
    backend = Scripted(tokenizer, good)
    result = run(backend, forget, tmp_path, concurrency=concurrency)
    assert backend.most == concurrency
    assert result.path.read_bytes() == run(Scripted(tokenizer, good), forget, tmp_path / "eight").path.read_bytes()


def test_what_is_asked_again_is_drawn_with_a_seed(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uld_sdk.async_client import AsyncUnlearnedClient

    plain, seen = AsyncUnlearnedClient.generate, []

    async def generate(self: Any, prompt: Any, **options: Any) -> Any:
        seen.append(options)
        return await plain(self, prompt, **options)

    monkeypatch.setattr(AsyncUnlearnedClient, "generate", generate)
    run(
        Scripted(tokenizer, lambda *_: ""), FORGET[:1], tmp_path, paraphrases=0, wrong=1, seed=2, tries=3, temperature=0.5, max_new_tokens=9
    )
    assert seen == [
        {"temperature": 0.0, "max_new_tokens": 9},
        {"temperature": 0.5, "max_new_tokens": 9, "seed": 513},
        {"temperature": 0.5, "max_new_tokens": 9, "seed": 514},
    ]


def test_a_reply_that_was_cut_off_loses_its_last_line(tokenizer: Any, tmp_path: Path) -> None:
    full = "It is called the Danube.\nIt is called the Elbe by all who live there."
    room = len(tokenizer.encode(full)) - 3
    backend = Scripted(tokenizer, lambda *_: full)
    result = run(backend, FORGET[:1], tmp_path, paraphrases=0, max_new_tokens=room)
    assert written(result.path)[0]["perturbed_answer"] == ["It is called the Danube."]
    assert result.counts["perturbed_answer"].left_out == 1


def test_other_rows_stay_and_doubles_go(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    chat = {"messages": [{"role": "user", "content": RIVER}, {"role": "assistant", "content": FORGET[0]["answer"]}]}
    rows = [
        {"text": "The Amber freezes."},
        {"messages": [*turns, *turns]},
        chat,
        FORGET[0],
        {**FORGET[0], "answer": "it is called the AMBER"},
    ]
    result = run(Scripted(tokenizer, good), rows, tmp_path)
    assert (result.rows, result.as_they_were, result.duplicates) == (3, 2, 2)
    out = written(result.path)
    assert out[:2] == rows[:2]
    assert out[2]["question"] == RIVER
    assert len(out[2]["paraphrased_question"]) == 2


async def test_it_runs_beside_a_loop(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    """As in a notebook, whose cells run inside a loop."""
    await asyncio.sleep(0)
    assert run(Scripted(tokenizer, good), forget, tmp_path).rows == len(FORGET)


def test_the_output_trains(tokenizer: Any, forget: Path, tiny_target: Path, tmp_path: Path) -> None:
    from uld_sdk import train

    result = run(Scripted(tokenizer, good), forget, tmp_path, retain=RETAIN, retain_out=tmp_path / "kept.jsonl")
    data = {"forget": result.path, "retain": result.retain_path}
    trained = train(
        base=tiny_target, **data, output=tmp_path / "a", steps=2, rank=2, batch_size=4, device="cpu", dtype="float32", progress=False
    )
    assert trained.manifest.steps == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": None}, "--offline"),
        ({"backend": None}, "--backend"),
        ({"neighbours": 1}, "--retain-out"),
        ({"retain_out": "kept.jsonl", "neighbours": 0}, "nothing would go into"),
        ({"paraphrases": -1}, "paraphrases is -1"),
        ({"wrong": True}, "wrong is True"),
        ({"tries": 0}, "tries is 0"),
        ({"temperature": 0}, "more than 0"),
        ({"seed": 2**32}, "seed"),
        ({"output": "out.json"}, ".jsonl"),
        ({"output": "forget.jsonl", "overwrite": True}, "named twice"),
        ({"retain_out": "out.jsonl", "neighbours": 1}, "named twice"),
        ({"backend": "vlm"}, "did you mean 'vllm'"),
    ],
)
def test_wrong_calls_say_what_is_wrong(
    tokenizer: Any, forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    backend = Scripted(tokenizer, good)
    with pytest.raises(UsageError) as raised:
        augment(**{"forget": "forget.jsonl", "output": "out.jsonl", "backend": backend, **options})
    assert words in str(raised.value)
    assert backend.asked.total() == 0
    assert not (tmp_path / "out.jsonl").exists()


def test_a_server_of_completions_can_be_asked(openai_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    result = augment(
        forget=FORGET[:1], output=tmp_path / "wider.jsonl", **{**OFF, "paraphrases": 1}, tries=1, max_new_tokens=8,
        backend="openai", base_url=f"{openai_server.url}/v1", tokenizer=str(tiny_target), route="completions",
    )  # fmt: skip
    assert result.asked > 0


def test_what_is_there_stays_unless_told_otherwise(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    backend = Scripted(tokenizer, good)
    (tmp_path / "out.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="already exists"):
        augment(forget=forget, output=tmp_path / "out.jsonl", backend=backend)
    assert backend.asked.total() == 0
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "mine"


def test_what_cannot_be_written_is_told_before_anything_is_asked(tokenizer: Any, forget: Path, tmp_path: Path) -> None:
    backend = Scripted(tokenizer, good)
    elsewhere = tmp_path / "elsewhere.cache"
    with pytest.raises(SaveFailed, match=r"out\.jsonl could not be written: .*forget\.jsonl is no folder") as caught:
        augment(forget=forget, output=forget / "out.jsonl", backend=backend, cache=elsewhere)
    assert "choose another -o/--output" in caught.value.hint
    with pytest.raises(SaveFailed, match=r"kept\.jsonl could not be written: .*forget\.jsonl is no folder") as caught:
        augment(forget=forget, output=tmp_path / "out.jsonl", retain_out=forget / "kept.jsonl", backend=backend, cache=elsewhere)
    assert "choose another --retain-out" in caught.value.hint
    assert backend.asked.total() == 0
    assert not elsewhere.exists()


def test_bad_sets_are_named_with_their_line(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(FORGET[0]) + '\n{"question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        run(Scripted(tokenizer, good), file, tmp_path)
    with pytest.raises(DataError, match="overlaps"):
        run(Scripted(tokenizer, good), FORGET, tmp_path, retain=FORGET[:1])


def test_no_text_comes_twice_across_rows(tokenizer: Any, tmp_path: Path) -> None:
    """Two rows whose paraphrases are the same, and one that paraphrases into a question to keep."""
    rows = [{"question": "Who counts?", "answer": "The farmer."}, {"question": "Who is counting?", "answer": "The farmer."}]

    def script(prompt: str, turn: int) -> str:
        return "Which man counts?\nWho opens the shop?" if asked_for(prompt)[0] == "paraphrased_question" else "no"

    result = run(Scripted(tokenizer, script), rows, tmp_path, retain=RETAIN, wrong=0)
    asked = [normalised(text) for row in written(result.path) for text in row.get("paraphrased_question", [])]
    assert asked == ["which man counts"]
