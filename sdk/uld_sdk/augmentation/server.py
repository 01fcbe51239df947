"""A chat server as the source of texts: every reply through the cache, a bounded number of requests at a time."""

from collections.abc import Callable, Sequence
from typing import Any

from uld_sdk.async_client import AsyncUnlearnedClient
from uld_sdk.augmentation.cache import Reply, ReplyCache, key
from uld_sdk.augmentation.prompts import instruction, listed
from uld_sdk.augmentation.tasks import Task
from uld_sdk.waiting import all_of

OnProgress = Callable[[int, int], None]


class Server:
    """Asks a client that has no assistant. First without sampling; what has to be asked again is drawn with a seed of its own."""

    def __init__(
        self,
        client: AsyncUnlearnedClient,
        cache: ReplyCache,
        *,
        seed: int,
        temperature: float,
        max_new_tokens: int,
        concurrency: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.client, self.cache = client, cache
        self.seed, self.temperature, self.max_new_tokens, self.concurrency = seed, temperature, max_new_tokens, concurrency
        self.on_progress = on_progress
        self.asked = 0
        self.cached = 0

    async def propose(self, tasks: Sequence[Task], attempt: int) -> list[list[str]]:
        """The texts that the server lists for each task."""
        replies = await self._ask([instruction(task) for task in tasks], attempt)
        return [listed(reply.text, cut=reply.finish == "length") for reply in replies]

    async def answers(self, questions: Sequence[str]) -> list[str]:
        """The server's own greedy answers, as a user would get them."""
        return [reply.text.strip() for reply in await self._ask(questions, 0)]

    async def _ask(self, prompts: Sequence[str], attempt: int) -> list[Reply]:
        capabilities = await self.client.capabilities()
        model = f"{self.client.backend.name}:{capabilities.model}"
        sampling: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature if attempt else 0.0}
        if attempt:
            sampling["seed"] = (self.seed << 8) + attempt
        keys = [key(model, prompt, sampling) for prompt in prompts]
        if not capabilities.continues:
            sampling.pop("seed", None)  # such a server draws by itself
        missing = {k: prompt for k, prompt in zip(keys, prompts, strict=True) if self.cache.get(k) is None}
        self.cached += len(keys) - len(missing)
        done = 0

        async def ask(item: tuple[str, str]) -> None:
            nonlocal done
            name, prompt = item
            self.asked += 1
            result = await self.client.generate(prompt, **sampling)
            self.cache.put(name, Reply(result.text, result.finish_reason))
            done += 1
            if self.on_progress is not None:
                self.on_progress(done, len(missing))

        await all_of(missing.items(), ask, concurrency=self.concurrency)
        found = [self.cache.get(k) for k in keys]
        return [reply for reply in found if reply is not None]
