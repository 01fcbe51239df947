"""Answers through the client beside those of the plain remote, on the same prompts."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from uld_sdk.demo.plain import PlainAnswer, PlainRemote
from uld_sdk.demo.questions import Question
from uld_sdk.evaluation.answers import Answered, TokenStep
from uld_sdk.evaluation.rouge import mean

END_SIGN = "∎"  # stands for a control token in the report


def _content(ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Token ids of an answer without its end token."""
    end = set(tokenizer.all_special_ids)
    kept = list(ids)
    while kept and kept[-1] in end:
        kept.pop()
    return tuple(kept)


def answered(question: Question, before: PlainAnswer, result: Any, tokenizer: Any, *, seconds: float | None = None) -> Answered:
    """One row of the comparison; `seconds` is given where the plain remote was timed beside the client."""
    report = result.report
    timed = seconds is not None
    controls = dict.fromkeys(tokenizer.all_special_ids, END_SIGN)
    return Answered(
        id=question.id,
        kind=question.kind,
        part=question.part,
        neighbour=question.neighbour,
        question=question.text,
        before=before.text,
        after=result.text,
        before_ids=_content(before.token_ids, tokenizer),
        after_ids=_content(result.token_ids, tokenizer),
        untouched=result.untouched,
        requests=report.requests,
        changed=report.changed,
        positions=report.positions,
        seconds=report.seconds_total if seconds is None else seconds,
        seconds_first=report.seconds_first_token or report.seconds_total,
        plain_seconds=before.seconds if timed else None,
        plain_seconds_first=before.seconds_first if timed else None,
        steps=tuple(
            TokenStep(
                controls.get(step.token_id, step.text),
                controls.get(step.remote_id, step.remote_text),
                step.gate,
                step.peak or 0.0,
                step.touched,
                step.changed,
            )
            for step in report.trace
            if timed
        ),
    )


def side_by_side(client: Any, remote: PlainRemote, questions: Sequence[Question], *, max_new_tokens: int) -> list[Answered]:
    """Each question asked twice, one after the other, each time from the same state of the server's prompt cache."""
    rows = []
    for question in questions:
        remote.settle()
        plain = remote.ask(question.text, max_new_tokens=max_new_tokens)
        remote.settle()
        begin = time.perf_counter()
        result = client.generate(question.text, max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - begin
        rows.append(answered(question, plain, result, remote.tokenizer, seconds=seconds))
    return rows


def in_bulk(
    client: Any, questions: Sequence[Question], before: Mapping[str, PlainAnswer], tokenizer: Any, *, max_new_tokens: int, concurrency: int
) -> list[Answered]:
    """All questions at once, against answers that the plain remote gave earlier."""
    results = client.generate_many([question.text for question in questions], concurrency=concurrency, max_new_tokens=max_new_tokens)
    return [answered(question, before[question.text], result, tokenizer) for question, result in zip(questions, results, strict=True)]


def sampled(
    client: Any, remote: PlainRemote, questions: Sequence[Question], *, max_new_tokens: int, temperature: float = 0.8, top_p: float = 0.95
) -> dict[str, Any]:
    """Requests an answer and seconds a token of sampled answers, the texts differing from the plain remote's by chance.

    `wall_ratio` is seconds a token of ours over seconds a token of the plain remote's.
    """
    requests, untouched = [], []
    ours = plain = 0.0
    our_tokens = plain_tokens = 0
    for number, question in enumerate(questions):
        remote.settle()
        answer = remote.ask(question.text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=number)
        plain, plain_tokens = plain + answer.seconds, plain_tokens + len(answer.token_ids)
        remote.settle()
        begin = time.perf_counter()
        result = client.generate(question.text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        ours, our_tokens = ours + time.perf_counter() - begin, our_tokens + len(result.token_ids)
        requests.append(result.report.requests)
        untouched.append(result.untouched)
    return {
        "temperature": temperature,
        "top_p": top_p,
        "answers": len(questions),
        "requests_per_answer": round(mean(requests), 3),
        "untouched": round(mean(untouched), 4),
        "wall_ratio": round((ours / max(our_tokens, 1)) / (plain / max(plain_tokens, 1)), 3) if plain else None,
    }
