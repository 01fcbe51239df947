"""Wall clock, first token and requests through the client, against the plain stream of the same emulated server."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from uld_offset_models.assistant import base_fingerprint, load_base_tokenizer
from uld_offset_models.loading import load_artifact
from uld_sdk import UnlearnedClient
from uld_sdk.demo import job
from uld_sdk.demo.figures import Plan
from uld_sdk.demo.plain import PlainAnswer
from uld_sdk.demo.questions import Question, load_questions
from uld_sdk.demo.server import packaged_model

ROUND_TRIP, SECONDS_PER_TOKEN = 0.020, 0.020
NEW_TOKENS, RETAIN, FORGET = 48, 20, 8
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


@dataclass
class Times:
    """Seconds of some answers: until the last token and until the first; tokens and requests of them all."""

    answers: int = 0
    total: float = 0.0
    first: float = 0.0
    tokens: int = 0
    requests: int = 0

    def add(self, total: float, first: float, tokens: int, requests: int = 1) -> None:
        """One answer more."""
        self.answers += 1
        self.total, self.first = self.total + total, self.first + first
        self.tokens, self.requests = self.tokens + tokens, self.requests + requests


@dataclass
class Pair:
    """The client and the plain remote on the same prompts: all of them, and those whose answer is untouched at every position."""

    ours: Times = field(default_factory=Times)
    theirs: Times = field(default_factory=Times)
    ours_untouched: Times = field(default_factory=Times)
    theirs_untouched: Times = field(default_factory=Times)


@contextmanager
def emulator(model: Path, dialect: str) -> Iterator[str]:
    """The address of an emulator in a process of its own, with the benchmark's latency."""
    script = Path(__file__).with_name("serve_emulator.py")
    command = [sys.executable, str(script), str(model), dialect, str(ROUND_TRIP), str(SECONDS_PER_TOKEN)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdout is None or process.stdin is None:
        raise RuntimeError("the emulator has no pipes")
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the emulator did not start")
        yield url
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def plain(
    http: httpx2.Client, url: str, dialect: str, tokenizer: Any, question: str, sampling: dict[str, float]
) -> tuple[float, float, int]:
    """One stream of the plain remote without log-probabilities: seconds in all, seconds to the first token, tokens."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    if dialect == "tgi":
        options = {"do_sample": bool(sampling), "details": True, **sampling}
        path, body = "/generate_stream", {"inputs": text, "parameters": {"max_new_tokens": NEW_TOKENS, **options}}
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
        path, body = "/v1/completions", {"prompt": ids, "max_tokens": NEW_TOKENS, "stream": True, "temperature": 0.0, **sampling}
    begin = time.perf_counter()
    first, tokens = 0.0, 0
    with http.stream("POST", url + path, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data:") and "[DONE]" not in line:
                first = first or time.perf_counter() - begin
                event = json.loads(line[5:])
                tokens += 1 if "token" in event else len(event.get("choices") or [])
    return time.perf_counter() - begin, first, tokens


def through(client: UnlearnedClient, question: str, sampling: dict[str, float]) -> tuple[tuple[float, float, int, int], bool]:
    """The same through the client, timed from outside, with the number of requests; and whether no position was touched."""
    begin = time.perf_counter()
    first = 0.0
    tokens = requests = 0
    untouched = False
    for piece in client.stream(question, max_new_tokens=NEW_TOKENS, **sampling):
        first = first or time.perf_counter() - begin
        if piece.result is not None:
            report = piece.result.report
            tokens, requests, untouched = piece.result.usage.completion_tokens, report.requests, report.untouched == report.positions
    return (time.perf_counter() - begin, first, tokens, requests), untouched


def small_pass(assistant: Path, base: Path, questions: list[Question]) -> float:
    """Median seconds of one pass of the small model over a prompt."""
    import torch

    model = load_artifact(assistant, base=str(base)).model
    seconds = []
    with torch.inference_mode():
        for question in questions:
            messages = [{"role": "user", "content": question.text}]
            encoded = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
            begin = time.perf_counter()
            model.logits(model.backbone(input_ids=encoded["input_ids"]).last_hidden_state[:, -1])
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def compare(url: str, dialect: str, client: UnlearnedClient, questions: list[Question], sampling: dict[str, float], tokenizer: Any) -> Pair:
    """Plain and client side by side, the order alternating; one untimed pair of calls warms the emulator's memo for each question."""
    pair = Pair()
    with httpx2.Client(timeout=120.0) as http:
        for number, question in enumerate(questions):
            plain(http, url, dialect, tokenizer, question.text, sampling)
            if question.kind == "forget":
                through(client, question.text, sampling)
            calls = [
                lambda q=question: plain(http, url, dialect, tokenizer, q.text, sampling),
                lambda q=question: through(client, q.text, sampling),
            ]
            found = {turn: calls[turn]() for turn in (number % 2, 1 - number % 2)}
            theirs, (ours, untouched) = found[0], found[1]
            pair.theirs.add(*theirs)
            pair.ours.add(*ours)
            if untouched:
                pair.theirs_untouched.add(*theirs)
                pair.ours_untouched.add(*ours)
    return pair


def ratio(ours: Times, theirs: Times) -> float | None:
    """Seconds a token against seconds a token."""
    return round((ours.total / ours.tokens) / (theirs.total / theirs.tokens), 3) if ours.tokens else None


def figures(pair: Pair) -> dict[str, Any]:
    """Ratios, and what they are made of."""
    ours, theirs, answers = pair.ours, pair.theirs, pair.ours.answers
    return {
        "answers": answers,
        "answers_untouched": pair.ours_untouched.answers,
        "wall_ratio": ratio(ours, theirs),
        "wall_ratio_untouched": ratio(pair.ours_untouched, pair.theirs_untouched),
        "first_token_ratio": round(ours.first / theirs.first, 3),
        "requests_per_answer": round(ours.requests / answers, 3),
        "plain_seconds": round(theirs.total, 3),
        "client_seconds": round(ours.total, 3),
        "plain_first_seconds": round(theirs.first / answers, 4),
        "client_first_seconds": round(ours.first / answers, 4),
        "plain_tokens": theirs.tokens,
        "client_tokens": ours.tokens,
    }


def own_answers(work: Path) -> dict[str, PlainAnswer]:
    """What the model itself says to the demo's questions, asked now if no part has asked before."""
    model = packaged_model()
    return job.ask_model(
        Plan(),
        load_questions(),
        model=model,
        model_hash=base_fingerprint(model),
        tokenizer=load_base_tokenizer(model),
        cache=work / "own_answers.json",
        clock=job.Clock(lambda line: print(f"  {line}", flush=True)),
    )


def assistant_for(work: Path) -> Path:
    """The assistant of the part `demo`, trained now if that part has not been run."""
    folder = work / "gated"
    if not (folder / "uld.json").exists():
        job.train_assistant(Plan(), load_questions(), own_answers(work), model=packaged_model(), output=folder, preset="gated")
    return folder


def measure(work: Path) -> dict[str, Any]:
    """Both dialects: retain prompts greedy, sampled and with one request a token; forget prompts greedy."""
    assistant, model, questions = assistant_for(work), packaged_model(), load_questions()
    tokenizer = load_base_tokenizer(model)
    retain, forget = questions.of("retain", "holdout"), questions.of("forget", "holdout")
    retain, forget = retain[:: len(retain) // RETAIN][:RETAIN], forget[:: len(forget) // FORGET][:FORGET]
    found: dict[str, Any] = {
        "round_trip_seconds": ROUND_TRIP,
        "seconds_per_token": SECONDS_PER_TOKEN,
        "new_tokens": NEW_TOKENS,
        "small_model_prompt_pass_seconds": round(small_pass(assistant, model, retain), 4),
    }
    for dialect in ("vllm", "tgi"):
        with emulator(model, dialect) as url:
            options = {"backend": dialect, "base_url": url, "assistant": str(assistant), "assistant_base": str(model), "top_logprobs": 20}
            with UnlearnedClient(**options) as client, UnlearnedClient(**options, draft=1) as single:
                for each in (client, single):
                    each.generate("Hello.", max_new_tokens=2)
                pair = compare(url, dialect, client, retain, {}, tokenizer)
                found[f"{dialect} retain greedy"] = figures(pair)
                one = Times()
                for question in retain:
                    one.add(*through(single, question.text, {})[0])
                found[f"{dialect} retain greedy"]["times_faster_than_one_request_a_token"] = round(one.total / pair.ours.total, 2)
                found[f"{dialect} retain sampled"] = figures(compare(url, dialect, client, retain, SAMPLED, tokenizer))
                found[f"{dialect} forget greedy"] = figures(compare(url, dialect, client, forget, {}, tokenizer))
        for name in found:
            if name.startswith(dialect):
                print(f"  {name}: {found[name]}", flush=True)
    return found
