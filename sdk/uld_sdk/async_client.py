"""AsyncUnlearnedClient: a remote model that behaves as if it had never seen the forget set."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal, Self

from uld_adapters.backend import Backend, Capabilities
from uld_adapters.errors import ArtifactMismatch, ContextExceeded, UsageError
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.classify import Alignment, classify
from uld_adapters.vocabulary.tokens import end_token_ids, tokenizer_fingerprint
from uld_offset_models.shift import Rule
from uld_sdk.generation import Answer, Settings
from uld_sdk.prompts import Message, Prompt, render
from uld_sdk.reading import Reader
from uld_sdk.result import Piece, Result, ScoreResult
from uld_sdk.sampling import Sampling
from uld_sdk.scoring import score_continuation
from uld_sdk.text import stop_strings
from uld_sdk.verify import Mode

REFUSAL = "I'm sorry, but I can't help with that."


class AsyncUnlearnedClient:
    """An unlearned view of a remote model, for asyncio; `UnlearnedClient` is the same without `await`.

    `backend` is a registered name (hf, tgi, vllm, llamacpp, or an installed one), `assistant` the folder of a trained
    artifact; None shows the plain remote. `alpha`, `margin` (nats) and `filter` default to the artifact's. `on_touched`
    "refuse" answers `refusal` as soon as the assistant touches an answer. `draft` is "stream", "auto" or tokens a request.
    `top_logprobs` is what to ask for at each position: by default 20, or the server's cap where that is lower.
    Raises UsageError for options that cannot be, ArtifactError for a folder that cannot be used.
    """

    def __init__(
        self,
        *,
        backend: str | Backend = "vllm",
        base_url: str | None = None,
        assistant: str | Any | None = None,
        model: Any = None,
        tokenizer: Any = None,
        assistant_base: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        http_client: Any = None,
        top_logprobs: int | None = None,
        alpha: float | None = None,
        margin: float | None = None,
        filter: float | None = None,
        on_touched: Literal["rewrite", "refuse"] = "rewrite",
        refusal: str = REFUSAL,
        draft: str | int = "stream",
        device: str = "cpu",
        trace: bool = False,
    ) -> None:
        if on_touched not in ("rewrite", "refuse"):
            raise UsageError(f"on_touched is {on_touched!r}", hint='choose "rewrite" or "refuse"')
        if not (draft in ("stream", "auto") or (isinstance(draft, int) and draft >= 1)):
            raise UsageError(f"draft is {draft!r}", hint='choose "stream", "auto" or a number of tokens')
        self._manifest: Any = None
        if assistant is not None:
            from uld_offset_models.manifest import read_manifest

            self._manifest = read_manifest(assistant)
        default = {name: getattr(self._manifest, name, getattr(Rule(), name)) for name in ("alpha", "margin", "filter")}
        given = {"alpha": alpha, "margin": margin, "filter": filter}
        self.rule = Rule(**{name: default[name] if value is None else value for name, value in given.items()})
        self._assistant, self._assistant_base, self._device = assistant, assistant_base, device
        if tokenizer is None and assistant is not None and not (backend == "hf" and isinstance(model, str)):
            tokenizer = str(assistant)
        if isinstance(backend, str):
            options = {"base_url": base_url, "model": model, "tokenizer": tokenizer, "api_key": api_key, "timeout": timeout}
            options |= {"max_retries": max_retries, "http_client": http_client, "top_logprobs": top_logprobs}
            self.backend = create_backend(backend, **options)
        else:
            self.backend = backend
        self._settings = {"on_touched": on_touched, "refusal": refusal, "draft": draft, "max_retries": max_retries, "trace": trace}
        self._worker: Any = None
        self._alignment: Alignment | None = None
        self._small_tokenizer: Any = None
        self._ends: frozenset[int] = frozenset()
        self._capabilities: Capabilities | None = None
        self._opening: asyncio.Lock = asyncio.Lock()

    async def capabilities(self) -> Capabilities:
        """What the server was found to do: probed once, with the tokenizer and the artifact checked against it."""
        async with self._opening:
            if self._capabilities is None:
                capabilities = await self.backend.probe()
                await asyncio.to_thread(self._load)
                self._capabilities = capabilities
        return self._capabilities

    def _load(self) -> None:
        self._ends = end_token_ids(self.backend.tokenizer)
        if self._assistant is None:
            return
        target = tokenizer_fingerprint(self.backend.tokenizer)
        self._alignment = classify(target, self._manifest.tokenizer_sha256)
        from uld_offset_models.artifact import load_artifact
        from uld_offset_models.scorer import Scorer
        from uld_sdk.batching import SmallWorker

        artifact = load_artifact(self._assistant, base=self._assistant_base, device=self._device)
        if artifact.manifest.method != "uld":
            raise ArtifactMismatch(f"{self._assistant} holds no assistant but method {artifact.manifest.method}", hint="use --method uld")
        self._small_tokenizer = artifact.model.tokenizer
        self._worker = SmallWorker(Scorer(artifact.model, threshold=self.rule.margin))

    async def _answer(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
    ) -> Answer:
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", hint="ask for at least one token")
        strings = stop_strings(stop)
        capabilities = await self.capabilities()
        mode = Mode.GREEDY
        if not sampling.greedy:
            mode = Mode.PASS_THROUGH if seed is None and sampling.server_can(capabilities) else Mode.MATCH
            if mode is Mode.MATCH and seed is None:
                sampling = sampling.with_fresh_seed()
        ids = render(self.backend.tokenizer, prompt, raw=raw)
        if capabilities.context is not None and len(ids) + max_new_tokens > capabilities.context:
            room = capabilities.context - len(ids)
            raise ContextExceeded(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the context of {capabilities.context}",
                hint=f"max_new_tokens can be at most {room}" if room > 0 else "shorten the prompt",
            )
        settings = Settings(
            rule=self.rule,
            sampling=sampling,
            mode=mode,
            max_new_tokens=max_new_tokens,
            stop=strings,
            **self._settings,  # type: ignore[arg-type]
        )
        return Answer(self.backend, capabilities, settings, ids, self._ends, reader=self._reader(prompt, raw=raw))

    def _reader(self, prompt: Prompt, *, raw: bool) -> Reader | None:
        if self._worker is None or self._alignment is None:
            return None
        from uld_offset_models.scorer import Track

        return Reader(self._worker, self._alignment, render(self._small_tokenizer, prompt, raw=raw), Track())

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Piece]:
        """Verified pieces as they are ready; the last carries the result. Options as in `generate`."""
        answer = await self._answer(prompt, **options)
        async with aclosing(answer.run()) as pieces:
            async for piece in pieces:
                yield piece

    async def generate(self, prompt: Prompt, **options: Any) -> Result:
        """One answer to a prompt, a user's message (or, raw=True, text to go on from).

        Options: max_new_tokens (256), temperature (0: greedy), top_k, top_p, min_p, seed, stop (strings), raw. A seed makes
        sampling reproducible (match mode); without one the server samples itself (pass-through).
        """
        async with aclosing(self.stream(prompt, **options)) as pieces:
            async for piece in pieces:
                if piece.result is not None:
                    return piece.result
        raise UsageError("the stream was closed before its end", hint="keep the client open while it answers")

    async def chat(self, messages: Sequence[Message], **options: Any) -> Result:
        """One answer to a conversation: [{"role": ..., "content": ...}, ...]. Options as in `generate`."""
        return await self.generate(messages, **options)

    async def generate_many(self, prompts: Sequence[Prompt], *, concurrency: int = 8, **options: Any) -> list[Result]:
        """Answers in the order of the prompts, at most `concurrency` at a time, the small model in batched passes.

        The first error cancels the rest and is raised.
        """
        if concurrency < 1:
            raise UsageError(f"concurrency is {concurrency}", hint="allow at least one request at a time")
        gate = asyncio.Semaphore(concurrency)

        async def one(prompt: Prompt) -> Result:
            async with gate:
                return await self.generate(prompt, **options)

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def score(self, prompt: Prompt, continuation: str, *, raw: bool = False) -> ScoreResult:
        """Log-probability of a given text after the prompt under the unlearned model, in nats, with bounds."""
        await self.capabilities()
        ids = render(self.backend.tokenizer, prompt, raw=raw)
        tokens = list(self.backend.tokenizer.encode(continuation, add_special_tokens=False))
        if not tokens:
            raise UsageError("the continuation is empty", hint="pass some text to score")
        score = await self.backend.score(ids, tokens)
        readings: list[Any] = [None] * len(tokens)
        reader = self._reader(prompt, raw=raw)
        if reader is not None:
            reader.prime([])
            await reader.primed()
            if len(tokens) > 1:
                await reader.read(tokens[:-1])
            readings = list(reader.ready)
        return score_continuation(score, readings, self.rule)

    async def close(self) -> None:
        """Close connections and the small model's thread."""
        await self.backend.aclose()
        if self._worker is not None:
            self._worker.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
