"""A remote and a small model over twelve tokens, each a table of log-probabilities by the last token: everything can be enumerated."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.logprobs import Draft, FinishReason, TopLogprobs
from uld_sdk.sampling import Sampling, process

WORDS = ["<end>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]
END = 0
ROWS = len(WORDS)


class Tokenizer:
    """A letter a token."""

    all_special_ids = (END,)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(WORDS[i] for i in ids if i != END)


def table(seed: int, scale: float | np.ndarray) -> np.ndarray:
    """Log-probabilities in nats of the next token, shape (last token, next token)."""
    logits = np.random.default_rng(seed).normal(size=(ROWS, ROWS)) * np.reshape(scale, (-1, 1))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


class Remote:
    """Draws from its table like a server; `processed` reports what is left after its sampling, as TGI does."""

    name = "toy"

    def __init__(self, log_p: np.ndarray, *, k: int = ROWS, processed: bool = False, rng: np.random.Generator) -> None:
        self.log_p, self.k, self.processed, self.rng = log_p, k, processed, rng
        self.tokenizer = Tokenizer()
        self.fail_next: list[Exception] = []
        self.requests = 0
        self.asked_again = False

    @property
    def capabilities(self) -> Capabilities:
        options = frozenset({"temperature", "top_k", "top_p"})
        return Capabilities("toy", self.k, processed=self.processed, sampling=options)

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        return prefix

    def report(self, values: np.ndarray) -> TopLogprobs:
        order = np.argsort(-values, kind="stable")[: self.k]
        order = order[np.isfinite(values[order])]
        return TopLogprobs.build(order, values[order], complete=self.k == ROWS and bool(np.isfinite(values).all()))

    def step(self, last: int, sampling: ServerSampling) -> tuple[int, TopLogprobs]:
        raw = self.log_p[last]
        if sampling.greedy:
            return int(raw.argmax()), self.report(raw)
        order = np.argsort(-raw, kind="stable")
        drawn = np.full(ROWS, -np.inf)
        drawn[order] = process(raw[order], Sampling(sampling.temperature, sampling.top_k, sampling.top_p))
        return int(self.rng.choice(ROWS, p=np.exp(drawn))), self.report(drawn if self.processed else raw)

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling) -> AsyncGenerator[Draft]:
        self.requests += 1
        last = prefix[-1]
        for i in range(n):
            last, top = self.step(last, sampling)
            stopped = last == END
            yield Draft((last,), (top,), FinishReason.STOP if stopped else FinishReason.LENGTH if i == n - 1 else None)
            if stopped:
                return

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling | None = None) -> Draft:
        if self.fail_next:
            raise self.fail_next.pop()
        self.requests += 1
        self.asked_again = True
        token, top = self.step(prefix[-1], sampling or ServerSampling())
        return Draft((token,), (top,))


class Thought:
    """The small model's reading after one token."""

    gate = None

    def __init__(self, excess: np.ndarray) -> None:
        self._excess = excess
        self.peak = float(excess.max())

    def bounds(self) -> None:
        return None

    def excess(self) -> np.ndarray:
        return self._excess


class Track:
    """What has been read."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def rollback(self, length: int) -> None:
        self.tokens = self.tokens[:length]


class Worker:
    """Reads by table: the excess log p_a - log u after each token."""

    def __init__(self, log_a: np.ndarray) -> None:
        self.excess = log_a + np.log(ROWS)

    async def read(self, track: Track, tokens: Sequence[int], *, every: bool = True) -> list[Thought]:
        track.tokens.extend(tokens)
        thoughts = [Thought(self.excess[token]) for token in tokens]
        return thoughts if every else thoughts[-1:]
