"""What a second artifact of the same base costs: the small models' reading by itself, and whole answers through the client."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import latency

from uld_offset_models.batch_reading import GroupScorer
from uld_offset_models.loading import load_artifact, load_together
from uld_sdk import UnlearnedClient, train
from uld_sdk.demo.figures import Plan
from uld_sdk.demo.questions import Question, load_questions
from uld_sdk.demo.server import packaged_model
from uld_sdk.prompts import render

RETAIN, FORGET = 16, 8  # questions
TOKENS, DRAFT = 32, 16  # of an answer
TOPIC = 12  # questions that the second assistant is to make forgotten

Read = Callable[[Sequence[int]], None]


def second_artifact(work: Path) -> Path:
    """An assistant for another topic: some of the demo's retain questions."""
    folder = work / "second"
    if not (folder / "uld.json").exists():
        own, questions, plan = latency.own_answers(work), load_questions(), Plan()
        rows = {
            kind: [
                {"question": row.text, "answer": own[row.text].text} for row in questions.of(kind, "train") if own[row.text].text.strip()
            ]
            for kind in ("forget", "retain")
        }
        settings = {"base": str(packaged_model()), "layers": plan.layers, "steps": plan.steps, "max_seconds": plan.max_seconds}
        train(forget=rows["retain"][:TOPIC], retain=rows["retain"][TOPIC:] + rows["forget"], output=folder, overwrite=True, **settings)
    return folder


def together(scorer: GroupScorer) -> Callable[[], Read]:
    """Readers of one text: a fresh track for each member, read in one batch."""

    def begin() -> Read:
        tracks = [scorer.track(member) for member in range(len(scorer.members))]

        def read(tokens: Sequence[int]) -> None:
            scorer.read([(track, tokens) for track in tracks])

        return read

    return begin


def apart(scorers: Sequence[GroupScorer]) -> Callable[[], Read]:
    """Readers of one text: each scorer by itself, one after the other."""

    def begin() -> Read:
        reads = [together(scorer)() for scorer in scorers]

        def read(tokens: Sequence[int]) -> None:
            for each in reads:
                each(tokens)

        return read

    return begin


def seconds(read: Read, pieces: Sequence[Sequence[int]]) -> list[float]:
    """Of each piece."""
    spent = []
    for piece in pieces:
        begin = time.perf_counter()
        read(piece)
        spent.append(time.perf_counter() - begin)
    return spent


def reading(first: Path, second: Path, texts: dict[str, list[tuple[list[int], list[int]]]]) -> dict[str, Any]:
    """Prompt, single tokens and drafts of prompts with their answers: one artifact, two together, two apart, the order alternating."""
    base = str(packaged_model())
    alone = [load_artifact(folder, base=base) for folder in (first, second)]
    scorers = [GroupScorer([artifact.scorer(threshold=artifact.manifest.margin)]) for artifact in alone]
    both = GroupScorer([artifact.scorer(threshold=artifact.manifest.margin) for artifact in load_together([first, second], base=base)])
    ways = {"one": together(scorers[0]), "together": together(both), "apart": apart(scorers)}
    taken: dict[str, dict[str, list[float]]] = {}
    for number, (kind, prompt, answer) in enumerate((kind, *text) for kind, pairs in texts.items() for text in pairs):
        names = list(ways)
        for way in names[number % 3 :] + names[: number % 3]:
            read = ways[way]()
            found = {f"the prompt of a {kind} question": sum(seconds(read, [prompt]))}
            found[f"a token of a {kind} answer"] = statistics.fmean(seconds(read, [[token] for token in answer]))
            again = ways[way]()
            again(prompt)
            found[f"a draft of {DRAFT} tokens, {kind}"] = sum(seconds(again, [answer[:DRAFT]]))
            for name, value in found.items():
                taken.setdefault(name, {}).setdefault(way, []).append(value)
    return {name: compared(of) for name, of in sorted(taken.items())}


def compared(of: dict[str, list[float]]) -> dict[str, float]:
    """Medians of each way, and of the ratios to one artifact, pair by pair."""
    found = {f"{way}_seconds": round(statistics.median(values), 5) for way, values in of.items()}
    for way in ("together", "apart"):
        found[f"{way}_ratio"] = round(statistics.median(a / b for a, b in zip(of[way], of["one"], strict=True)), 3)
    return found


def through_the_client(url: str, first: Path, second: Path, questions: list[Question]) -> dict[str, Any]:
    """Wall clock a token of answers with two assistants against one, taking turns: where neither touches anything, and where one does."""
    options = {"backend": "vllm", "base_url": url, "assistant_base": str(packaged_model()), "top_logprobs": 20}
    ratios: dict[str, list[float]] = {"untouched by both": [], "touched": []}
    with UnlearnedClient(assistant=first, **options) as one, UnlearnedClient(assistant=[first, second], **options) as two:
        for client in (one, two):
            client.generate("Hello.", max_new_tokens=2)
        for number, question in enumerate(questions):
            for client in (one, two):  # the emulator keeps what it has computed
                client.generate(question.text, max_new_tokens=latency.NEW_TOKENS)
            pace, untouched = {}, False
            for client in (one, two) if number % 2 else (two, one):
                (total, _, written, _), whole = latency.through(client, question.text, {})
                pace[client], untouched = total / written, whole if client is two else untouched
            ratios["untouched by both" if untouched else "touched"].append(pace[two] / pace[one])
    return {kind: {"wall_ratio": round(statistics.median(found), 3), "answers": len(found)} for kind, found in ratios.items() if found}


def measure(work: Path) -> dict[str, Any]:
    """Reading the model's own answers to the demo's training questions, and answering held-out ones."""
    first, second = latency.assistant_for(work), second_artifact(work)
    own, questions = latency.own_answers(work), load_questions()
    tokenizer = load_artifact(first, base=str(packaged_model())).model.tokenizer
    answered = {"retain": questions.of("retain", "train")[TOPIC:][:RETAIN], "forget": questions.of("forget", "train")[:FORGET]}
    texts = {
        kind: [(render(tokenizer, row.text), tokenizer.encode(own[row.text].text, add_special_tokens=False)[:TOKENS]) for row in rows]
        for kind, rows in answered.items()
    }
    asked = [*questions.of("retain", "holdout")[:RETAIN], *questions.of("forget", "holdout")[:FORGET]]
    found: dict[str, Any] = {
        "answers": sum(map(len, texts.values())),
        "round_trip_seconds": latency.ROUND_TRIP,
        "seconds_per_token": latency.SECONDS_PER_TOKEN,
        "reading": reading(first, second, texts),
    }
    print(f"  {found['reading']}", flush=True)
    with latency.emulator(packaged_model(), "vllm") as url:
        found["client"] = through_the_client(url, first, second, asked)
    print(f"  {found['client']}", flush=True)
    return found
