"""How the OpenAI dialect tells an answer: tokens by string and bytes, and its text in whole characters."""

import codecs
from dataclasses import dataclass
from typing import Any

import numpy as np

from uld_adapters.emulator.desk import Step
from uld_adapters.emulator.engine import Engine
from uld_adapters.emulator.sampling import Row, top
from uld_adapters.vocabulary.tokens import Vocabulary

LOWEST = -9999.0  # what the real API writes for a token outside its largest top k
LARGEST_TOP = 20


class Names:
    """What a token is called. Without `token_bytes` half a character is U+FFFD and nothing more, as many servers tell it."""

    def __init__(self, engine: Engine, *, token_bytes: bool) -> None:
        self._vocabulary = Vocabulary.from_hf(engine.tokenizer)
        self._token_bytes = token_bytes

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, of a control token those of its name."""
        return self._vocabulary.tokens[token] if token < self._vocabulary.rows else b""

    def spelling(self, token: int) -> bytes:
        """What a token adds to the text: nothing for a control token."""
        return b"" if token in self._vocabulary.control else self.bytes_of(token)

    def completion(self, token: int) -> str:
        """The name of a token in the older route."""
        data = self.bytes_of(token)
        if not self._token_bytes:
            return data.decode("utf-8", "replace")
        return data.decode() if _is_whole(data) else "bytes:" + data.decode("utf-8", "backslashreplace")

    def chat(self, token: int, value: float) -> dict[str, Any]:
        """The entry of a token in the newer route."""
        data = self.bytes_of(token)
        text = data.decode("utf-8", "backslashreplace" if self._token_bytes else "replace")
        return {"token": text, "logprob": max(value, LOWEST), "bytes": list(data) if self._token_bytes else None}


def chat_entry(names: Names, row: Row, token: int, k: int) -> dict[str, Any]:
    """One position of the newer route: the written token's value is told only within the largest top k."""
    within = int(np.count_nonzero(row > row[token])) < LARGEST_TOP
    own = names.chat(token, float(row[token]) if within else LOWEST)
    return own | {"top_logprobs": [names.chat(int(i), float(row[i])) for i in top(row, k)]}


def completion_lists(names: Names, steps: list[tuple[Step, int]], k: int) -> dict[str, Any]:
    """The four parallel lists of the older route, from steps with the places of their texts; equal names become one key."""
    lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for step, offset in steps:
        row, token = step.raw, step.token
        shown = [*(int(i) for i in top(row, k)), token]
        lists["tokens"].append(names.completion(token))
        lists["token_logprobs"].append(max(float(row[token]), LOWEST))
        lists["top_logprobs"].append({names.completion(i): max(float(row[i]), LOWEST) for i in shown} if k else None)
        lists["text_offset"].append(offset)
    return lists


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class _Waiting:
    """A written token, where its text begins, and where it ends once the character is complete."""

    step: Step
    begin: int
    end: int | None = None


class Telling:
    """An answer as it is sent: whole characters, and of a possible stop string nothing; each token with the end of its text."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = max((len(s) - 1 for s in stop), default=0)
        self._waiting: list[_Waiting] = []
        self._sent = self._whole = 0  # whole: how much of the text has all its tokens
        self._text = ""
        self.stopped = False

    def push(self, step: Step, data: bytes) -> None:
        """Take one written token, and look for stop strings."""
        before = len(self._text)
        self._text += self._decoder.decode(data)
        own = len(data.decode()) if _is_whole(data) else len(self._text) - before
        self._waiting.append(_Waiting(step, len(self._text) - own))  # what was broken before it is not its own
        if not self._decoder.getstate()[0]:
            self._settle()
        found = [at for s in self._stop if (at := self._text.find(s, max(0, before - len(s) + 1))) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
            self._waiting = [waiting for waiting in self._waiting if waiting.begin < len(self._text)]

    def _settle(self) -> None:
        self._whole = len(self._text)
        for waiting in self._waiting:
            waiting.end = len(self._text) if waiting.end is None else waiting.end

    def take(self, *, last: bool) -> tuple[str, list[tuple[Step, int]]]:
        """What may be sent now: text, and tokens with the places where theirs begins."""
        if last and not self.stopped:
            self._text += self._decoder.decode(b"", final=True)
            self._settle()
        end = len(self._text) if last else max(self._sent, min(self._whole, len(self._text) - self._held))
        piece, self._sent = self._text[self._sent : end], end
        ready = [w for w in self._waiting if last or (w.end is not None and w.end <= end)]
        self._waiting = self._waiting[len(ready) :]
        return piece, [(w.step, w.begin) for w in ready]
