"""The raw top k of a position whose report is processed: what a server's own sampling did to it is undone or asked for again."""

import asyncio
import contextvars
from collections.abc import Sequence

from uld_adapters.backend import Backend
from uld_adapters.errors import MalformedAnswer
from uld_adapters.logprobs import TopLogprobs
from uld_sdk.sampling import Sampling
from uld_sdk.verify import undone


async def raw_report(
    backend: Backend, prefix: Sequence[int], processed: TopLogprobs, sampling: Sampling, context: contextvars.Context
) -> tuple[TopLogprobs, bool]:
    """The raw top k of the position after a prefix; False where the server's cuts stay.

    A temperature is undone. What top-k and top-p cut away is asked for again with one greedy token, but after half a
    character, or in a split that is not the text's own, no request can ask. Requests are counted in `context`.
    """
    cut = sampling.top_k is not None or (sampling.top_p or 1.0) < 1.0
    if not cut or backend.resume(prefix) != prefix:
        return undone(processed, sampling.temperature), not cut
    draft = await asyncio.create_task(backend.draft(prefix, 1), context=context)
    if not draft.positions:
        raise MalformedAnswer("the server wrote nothing where a token was asked for")
    if not draft.positions[0].ids.size:
        return undone(processed, sampling.temperature), False
    return draft.positions[0], True
