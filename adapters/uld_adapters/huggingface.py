"""A local transformers model as the target: complete distributions, no server."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.device import usable_device
from uld_adapters.errors import ContextExceeded, ModelNotFound, UnknownName, UsageError
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs
from uld_adapters.served import GREEDY
from uld_adapters.vocabulary.tokens import end_token_ids, load_tokenizer

KEPT_PREFIXES = 8  # key-value caches of earlier texts; a draft goes on from the one with the longest common prefix
DTYPES = ("float32", "bfloat16", "float16")


class HuggingFaceBackend:
    """A causal language model of transformers in this process.

    `model` is a folder, a hub name or a loaded model. `top_logprobs` None, or as many as there are tokens, gives complete
    distributions. Without `device` and `dtype` a loaded model stays as it is, and another comes to the CPU in float32. Options
    that speak of a server are not taken.
    """

    name = "hf"

    def __init__(
        self,
        *,
        model: Any = None,
        tokenizer: Any = None,
        top_logprobs: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        base_url: str | None = None,
        **server_options: Any,
    ) -> None:
        if model is None:
            raise UsageError("the hf backend runs a local model, and none was named", hint="pass model=... (--model): a folder or hub name")
        if base_url is not None:
            raise UsageError(
                "the hf backend runs a local model", hint="leave base_url out (--base-url, ULD_BASE_URL), or name another backend"
            )
        if dtype is not None and dtype not in DTYPES:
            raise UnknownName("dtype", dtype, DTYPES)
        self._source, self._tokenizer_source = model, tokenizer
        self.top_logprobs = top_logprobs
        self.device, self.dtype = device, dtype
        self._model: Any = None
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._kept: list[tuple[list[int], Any]] = []

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer; by default the one in the model's folder."""
        if self._tokenizer is None:
            source = self._tokenizer_source or (self._source if isinstance(self._source, str | Path) else None)
            if source is None:
                raise UsageError("a loaded model comes without its tokenizer", hint="pass tokenizer=... too")
            self._tokenizer = load_tokenizer(source)
        return self._tokenizer

    @property
    def model(self) -> Any:
        """The model, loaded when first used."""
        if self._model is None:
            import torch
            from transformers import AutoModelForCausalLM

            loaded, device, dtype = self._source, self.device, self.dtype
            place = None if device is None else usable_device(device)
            if not isinstance(loaded, torch.nn.Module):
                try:
                    loaded = AutoModelForCausalLM.from_pretrained(str(loaded), dtype=getattr(torch, dtype or "float32"))
                except (OSError, ValueError) as error:
                    raise ModelNotFound(f"no model loads from {self._source!r}: {error}", hint="pass a folder or a hub name") from error
            elif dtype is not None:
                loaded = loaded.to(getattr(torch, dtype))
            self._model = (loaded if place is None else loaded.to(place)).eval()
        return self._model

    async def probe(self) -> Capabilities:
        """A local model can do everything; only its context and the size of its vocabulary are looked up."""
        whole = self.top_logprobs is not None and self.top_logprobs >= getattr(self.model.config, "vocab_size", np.inf)
        return Capabilities(
            model=str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__),
            top_logprobs=None if whole else self.top_logprobs,
            scoring="prompt",
            sampling=frozenset({"temperature"}),
            context=getattr(self.model.config, "max_position_embeddings", None),
        )

    def _logits(self, ids: Sequence[int], last: int) -> Any:
        """Log-probabilities after each of the last `last` ids, shape (last, vocabulary), reusing an earlier text's cache."""
        import torch
        from transformers import DynamicCache

        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and len(ids) > context:
            raise ContextExceeded(f"{len(ids)} tokens exceed the context of {context}", hint="shorten the prompt or lower max_new_tokens")
        with self._lock, torch.inference_mode():
            shared, slot = 0, None
            for number, (kept, _) in enumerate(self._kept):
                common = next((i for i, (a, b) in enumerate(zip(kept, ids, strict=False)) if a != b), min(len(kept), len(ids)))
                if min(common, len(ids) - last) > shared:
                    shared, slot = min(common, len(ids) - last), number
            cache = DynamicCache()
            if slot is not None:
                _, old = self._kept.pop(slot)
                for layer, kv in enumerate(old.layers):
                    cache.update(kv.keys[:, :, :shared], kv.values[:, :, :shared], layer)
            fresh = torch.tensor([list(ids[shared:])], device=self.model.device)
            out = self.model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=last)
            self._kept = [*self._kept[-KEPT_PREFIXES + 1 :], (list(ids), cache)]
            return torch.log_softmax(out.logits[0].double(), -1).cpu().numpy()

    def _top(self, row: np.ndarray) -> TopLogprobs:
        if self.top_logprobs is None or self.top_logprobs >= row.size:
            order = np.argsort(-row, kind="stable")
            return TopLogprobs(order, row[order], complete=True)
        order = np.argpartition(-row, self.top_logprobs - 1)[: self.top_logprobs]
        return TopLogprobs.build(order, row[order])

    def _next(self, ids: list[int], sampling: ServerSampling) -> tuple[int, TopLogprobs]:
        row = self._logits(ids, 1)[0]
        if sampling.greedy:
            return int(row.argmax()), self._top(row)
        weights = np.exp((row - row.max()) / sampling.temperature)
        return int(np.random.default_rng().choice(row.size, p=weights / weights.sum())), self._top(row)

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """Write token by token, each a piece of its own; the model runs in a thread."""
        ids, ends = list(prefix), end_token_ids(self.tokenizer)
        for step in range(n):
            token, top = await asyncio.to_thread(self._next, ids, sampling)
            ids.append(token)
            ended = token in ends
            finish = FinishReason.STOP if ended else FinishReason.LENGTH if step + 1 == n else None
            yield Draft((token,), (top,), finish)
            if ended:
                return

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> Draft:
        """The stream as one piece."""
        pieces = [piece async for piece in self.stream(prefix, n, sampling)]
        return Draft(
            tuple(t for p in pieces for t in p.tokens), tuple(k for p in pieces for k in p.positions), pieces[-1].finish if pieces else None
        )

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """One forward pass over prefix and continuation."""
        ids = [*prefix, *continuation]
        rows = await asyncio.to_thread(self._logits, ids[:-1], len(continuation))
        values = np.array([row[token] for row, token in zip(rows, continuation, strict=True)])
        return Score(tuple(continuation), values, tuple(self._top(row) for row in rows))

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """The prefix itself: a local model takes ids."""
        return prefix

    async def aclose(self) -> None:
        """Forget the kept caches."""
        self._kept = []
