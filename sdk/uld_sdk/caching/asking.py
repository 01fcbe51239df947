"""Texts before a target, some at a time: what each costs is found out on the first of them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from uld_adapters.backend import Backend
from uld_adapters.errors import UsageError
from uld_adapters.http import TALLY, Tally
from uld_offset_models.target_record import TargetLogprobs
from uld_sdk.caching.texts import Text
from uld_sdk.waiting import all_of

OnProgress = Callable[[int, int], None]
_FIRST = 3  # texts that tell what the others will cost
_SAME = 0.1  # mean total variation between two answers of one server: batching moves a hundredth, other weights much more


@dataclass(frozen=True)
class Cost:
    """What is still to come: texts, their tokens to score, about how many HTTP requests, and seconds with one text at a time.

    `scoring` is how the server is asked: "prompt", one request a text, or "forced" or "drafts", piece by piece.
    """

    scoring: str
    texts: int
    tokens: int
    requests: int
    seconds: float


class Asking:
    """Scores texts, at most `concurrency` at a time, and hands over each result as soon as it has come."""

    def __init__(
        self, backend: Backend, keep: Callable[[Text, TargetLogprobs], None], *, concurrency: int, on_progress: OnProgress | None
    ) -> None:
        self.backend, self.keep, self.concurrency, self.on_progress = backend, keep, concurrency, on_progress
        self.done = 0

    async def score(self, text: Text) -> TargetLogprobs:
        """One text's log-probabilities."""
        return TargetLogprobs.from_score(await self.backend.score(text.prompt, text.row.answer))

    async def first(self, texts: Sequence[Text], *, scoring: str) -> tuple[Cost, list[Text]]:
        """Score a few of the texts one after the other, and tell by them what the others will cost; returns those as well.

        How much less time several at a time will take depends on the server.
        """
        count = min(len(texts), _FIRST if len(texts) > 10 * _FIRST else 1)
        places = {round(place) for place in np.linspace(0, len(texts) - 1, count)}
        some = [text for place, text in enumerate(texts) if place in places]
        rest = [text for place, text in enumerate(texts) if place not in places]
        tally, began = TALLY.get() or Tally(), time.perf_counter()
        before = tally.requests
        for text in some:
            await self.all([text], of=len(texts))
        share = tokens_of(rest) / tokens_of(some)
        requests, seconds = (tally.requests - before) * share, (time.perf_counter() - began) * share
        return Cost(scoring, len(rest), tokens_of(rest), math.ceil(requests), seconds), rest

    async def all(self, texts: Sequence[Text], *, of: int) -> None:
        """Score texts; the first error cancels the others and is raised. `of` is how many texts there are in this run."""

        async def one(text: Text) -> None:
            self.keep(text, await self.score(text))
            self.done += 1
            if self.on_progress is not None:
                self.on_progress(self.done, of)

        await all_of(texts, one, concurrency=self.concurrency)

    async def check_same(self, text: Text, kept: TargetLogprobs) -> None:
        """Score a text again that was kept before; raises `UsageError` where the server answers otherwise by now."""
        distance = _total_variation(await self.score(text), kept)
        if distance > _SAME:
            raise UsageError(
                f"the server answers otherwise than when the cache was begun: on {text.place} its probabilities moved by {distance:.2f}"
                " (mean total variation), so that another model, or another setting, hides behind the same name",
                hint="start the server as it was, or choose another -o/--output",
            )


def tokens_of(texts: Sequence[Text]) -> int:
    """Tokens to score: the answers with their end tokens."""
    return sum(len(text.row.answer) for text in texts)


def _total_variation(one: TargetLogprobs, other: TargetLogprobs) -> float:
    """Mean over positions of the total variation between both top k, as far as they tell."""
    distances = []
    for first, second in zip(_probabilities(one), _probabilities(other), strict=True):
        distances.append(0.5 * sum(abs(first.get(token, 0.0) - second.get(token, 0.0)) for token in first.keys() | second.keys()))
    return float(np.mean(distances))


def _probabilities(values: TargetLogprobs) -> list[dict[int, float]]:
    return [
        dict(zip(ids, line, strict=True))
        for ids, line in zip(values.ids.tolist(), np.exp(values.logprobs.astype(np.float64)).tolist(), strict=True)
    ]
