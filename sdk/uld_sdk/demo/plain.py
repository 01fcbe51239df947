"""The remote as it is, asked without any of our code in between: what "before" and "the plain remote" mean."""

import hashlib
import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PlainAnswer:
    """An answer of the plain remote: its tokens without the end token, and seconds until the first and the last of them."""

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    seconds: float
    seconds_first: float


class PlainRemote:
    """Streams from llama.cpp's `/completion` by the standard library alone, without log-probabilities."""

    def __init__(self, url: str, tokenizer: Any, *, timeout: float = 120.0) -> None:
        self.url = url
        self.tokenizer = tokenizer
        self.timeout = timeout

    def prompt_ids(self, question: str) -> list[int]:
        """The question as one user message in the model's own chat template."""
        messages = [{"role": "user", "content": question}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    def settle(self) -> None:
        """Put the server's prompt cache in the same state before each answer that is to be compared.

        What a prompt shares with the one before it is not computed again, and llama.cpp's values differ in the last bits with
        the number of tokens computed together: enough to flip a near-tie and make the plain remote differ from itself.
        """
        self.ask("Ready?", max_new_tokens=1)

    def ask(self, question: str, *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> PlainAnswer:
        """One streamed answer; greedy at temperature 0."""
        body = {
            "prompt": self.prompt_ids(question),
            "n_predict": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": seed,
            "samplers": ["temperature", "top_p"],
            "return_tokens": True,
            "stream": True,
        }
        request = urllib.request.Request(f"{self.url}/completion", json.dumps(body).encode(), {"content-type": "application/json"})
        tokens: list[int] = []
        ended = False
        begin = time.perf_counter()
        first = 0.0
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if not event["stop"]:
                    first = first or time.perf_counter() - begin
                    tokens += event.get("tokens", ())
                ended = event.get("stop_type") == "eos"
        seconds = time.perf_counter() - begin
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return PlainAnswer(text, tuple(tokens), ended, seconds, first or seconds)


def own_answers(
    remote: PlainRemote, questions: Sequence[str], *, max_new_tokens: int, concurrency: int, cache: Path, model_hash: str
) -> tuple[dict[str, PlainAnswer], bool]:
    """The model's own greedy answers, kept in a file for the next run; the second value says whether that file was used.

    The file is keyed by the model's hash, the prompts' token ids and the length: if any of them changes it is made anew.
    """
    key = hashlib.sha256(json.dumps([model_hash, max_new_tokens, [remote.prompt_ids(text) for text in questions]]).encode()).hexdigest()
    kept = _read_cache(cache, key)
    if kept is not None:
        return kept, True
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda text: remote.ask(text, max_new_tokens=max_new_tokens), questions))
    found = dict(zip(questions, answers, strict=True))
    content = {"key": key, "answers": {question: asdict(answer) for question, answer in found.items()}}
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return found, False


def _read_cache(cache: Path, key: str) -> dict[str, PlainAnswer] | None:
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        return {q: PlainAnswer(**{**a, "token_ids": tuple(a["token_ids"])}) for q, a in content["answers"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
