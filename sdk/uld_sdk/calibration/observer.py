"""Hold-out answers as the large and the small model see them: asked or scored once, read once, whatever is swept later."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from uld_adapters.backend import Backend
from uld_adapters.errors import DataError, MalformedAnswer
from uld_adapters.logprobs import Score
from uld_offset_models.data import Row
from uld_sdk.async_client import AsyncUnlearnedClient
from uld_sdk.bridge_reading import BridgedReading
from uld_sdk.calibration.position import Observed, kept_position
from uld_sdk.prompts import Prompt, check_room
from uld_sdk.reading import AlignedReading
from uld_sdk.verify import is_touched
from uld_sdk.waiting import all_of


class Observer(AsyncUnlearnedClient):
    """A client that hands over what it sees at each position instead of an answer; its own margin is the sweep's least."""

    async def observe(self, row: Row, *, max_new_tokens: int, ratio: float) -> Observed:
        """One row: its answer scored or, where it has none, the remote's own greedy answer; `ratio` is the sweep's least filter."""
        capabilities = await self.capabilities()
        turns = row.example.messages
        alone = len(turns) == 1 and turns[0][0] == "user"
        prompt: Prompt = turns[0][1] if alone else [{"role": role, "content": content} for role, content in turns]
        backend, ids = self._about(prompt, raw=False)
        if row.example.answer:
            tokens = list(self.backend.tokenizer.encode(row.example.answer, add_special_tokens=False))
            if not tokens:
                raise DataError(f"{row.example.place}: the answer has no token", hint="fill it, or leave the field out")
            check_room(len(ids), len(tokens), capabilities.context, whose="the model's")
            score = await backend.score(ids, tokens)
            own = [int(top.ids[0]) for top in score.positions]
        else:
            check_room(len(ids), max_new_tokens, capabilities.context, whose="the model's")
            score = await _asked(backend, ids, max_new_tokens)
            own = list(score.tokens)
        if self._small is None:
            raise MalformedAnswer("a calibration without an assistant", hint="name the artifact")
        (side,) = self._small.sides
        reader = side.reader(prompt, raw=False, new=len(score.tokens))
        readings: Sequence[AlignedReading | BridgedReading] = await reader.along(score.tokens, score.positions)
        least = replace(side.chosen.rule, alpha=1.0, filter=ratio)
        places = zip(score.positions, readings, score.tokens, score.logprobs, own, strict=True)
        kept = [
            kept_position(top, reading, least, label=token, logprob=float(value), own=greedy)
            for top, reading, token, value, greedy in places
            if is_touched(reading, least)
        ]
        return Observed(len(score.tokens), tuple(kept))

    async def observe_all(self, rows: Sequence[Row], *, max_new_tokens: int, ratio: float, concurrency: int) -> list[Observed]:
        """All rows in their order, at most `concurrency` at a time; the first error cancels the rest and is raised."""
        return await all_of(rows, lambda row: self.observe(row, max_new_tokens=max_new_tokens, ratio=ratio), concurrency=concurrency)


async def _asked(backend: Backend, ids: Sequence[int], max_new_tokens: int) -> Score:
    """The remote's own answer: its draft reports K and each token's own value, so that nothing need be scored again.

    An end that the server does not report is left out.
    """
    draft = await backend.draft(ids, max_new_tokens)
    reported = [(token, top) for token, top in zip(draft.tokens, draft.positions, strict=True) if top.ids.size]
    if not reported:
        raise MalformedAnswer("the server ended its answer without writing anything")
    values = [top.of(token) for token, top in reported]
    tokens, tops = zip(*reported, strict=True)
    return Score(tokens, np.array([np.nan if value is None else value for value in values]), tops)
