"""AsyncUnlearnedClient: a remote model that behaves as if it had never seen the forget set."""

import asyncio
import warnings
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from uld_adapters.backend import Backend, Capabilities, TakesMessages
from uld_adapters.errors import UsageError
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_adapters.vocabulary.words import utf8
from uld_offset_models.shift import Rule
from uld_sdk.aligning import align
from uld_sdk.batching import SmallWorker
from uld_sdk.continuing import check_continuing
from uld_sdk.generation import Answer
from uld_sdk.keywords import chosen, spelled
from uld_sdk.options import Connection, ConnectionKeywords, Generation, GenerationKeywords, ScoreKeywords, Scoring
from uld_sdk.prompts import Message, Prompt, check_prompt, check_room, conversation, render
from uld_sdk.result import Piece, Result, ScoreResult
from uld_sdk.sampling import Sampling
from uld_sdk.scoring import score_continuation
from uld_sdk.settings import Settings
from uld_sdk.small_side import Chosen, SmallSides, check_once, choose, rule_of
from uld_sdk.templates import TemplateWarning, no_template, template_doubt
from uld_sdk.verify import Mode
from uld_sdk.waiting import all_of


class AsyncUnlearnedClient:
    """An unlearned view of a remote model, for asyncio; `UnlearnedClient` is the same without `await`.

    Raises `UsageError` for options that cannot be, `ArtifactError` for an assistant that cannot be used. Without `tokenizer`
    prompts take the form of the assistant's base; a `TemplateWarning` says so where the server is not known to do the same.
    """

    @spelled(Connection)
    def __init__(self, **options: Unpack[ConnectionKeywords]) -> None:
        self.options = said = chosen(Connection, options)
        self._said = {name: getattr(said, name) for name in ("alpha", "margin", "filter", "tail") if getattr(said, name) is not None}
        self._chosen = tuple(choose(folder, base, self._said) for folder, base in zip(said.assistants, said.bases, strict=True))
        check_once(self._chosen)
        self.rule = rule_of(self._chosen) if self._chosen else Rule(**self._said)
        tokenizer = said.tokenizer
        own = said.backend == "hf" and isinstance(said.model, str | Path)  # such a model brings its tokenizer
        lender = self._chosen[0] if self._chosen and tokenizer is None and isinstance(said.backend, str) and not own else None
        self._lender = None if lender is None else lender.manifest.base.id
        self.backend = self._reach(said, tokenizer if lender is None else str(lender.folder))
        self._small: SmallSides | None = None
        self._workers: weakref.WeakSet[SmallWorker] = weakref.WeakSet()
        self._ends: frozenset[int] = frozenset()
        self._capabilities: Capabilities | None = None
        self._doubt: str | None = None
        self._opening: asyncio.Lock = asyncio.Lock()

    def _reach(self, said: Connection, tokenizer: Any) -> Backend:
        if not isinstance(said.backend, str):
            return said.backend
        shared = ("base_url", "model", "api_key", "timeout", "max_retries", "http_client", "top_logprobs")
        place = {"device": said.target_device, "dtype": said.target_dtype}
        place |= {"route": said.route}
        given = {name: value for name, value in place.items() if value is not None}  # only for the backends that know them
        return create_backend(said.backend, tokenizer=tokenizer, **{name: getattr(said, name) for name in shared}, **given)

    async def capabilities(self) -> Capabilities:
        """What the server was found to do: probed once, with the tokenizer and the artifact checked against it."""
        async with self._opening:
            if self._capabilities is None:
                capabilities = await self.backend.probe()
                self._ends = end_token_ids(self.backend.tokenizer)
                await self._exchange(self._chosen)
                if self._lender is not None and not isinstance(self.backend, TakesMessages):
                    self._doubt = await template_doubt(self.backend, capabilities.model, self._lender)
                elif not isinstance(self.backend, TakesMessages):
                    self._doubt = no_template(self.backend, trained=any(each.manifest.chat_template for each in self._chosen))
                self._capabilities = capabilities
        return self._capabilities

    @property
    def assistants(self) -> tuple[Path, ...]:
        """The folders of the assistants that the next answer will have."""
        return tuple(each.folder for each in self._chosen)

    async def add_assistant(self, folder: str | Path, *, base: str | Path | None = None) -> None:
        """Load one more assistant, for the answers that begin from then on; those under way keep what they began with.

        `base` is where its base model lies now (None: where it lay in training). Raises as the constructor does, and `UsageError` for
        an assistant that is there already; then nothing has changed.
        """
        await self.capabilities()
        async with self._opening:
            await self._exchange((*self._chosen, choose(folder, base, self._said)))

    async def remove_assistant(self, folder: str | Path) -> None:
        """Go on without an assistant, likewise; without any the client shows the plain large model.

        Raises `UsageError` for a folder that is none of theirs.
        """
        await self.capabilities()
        async with self._opening:
            rest = tuple(each for each in self._chosen if each.folder.resolve() != Path(folder).resolve())
            if len(rest) == len(self._chosen):
                present = ", ".join(map(str, self.assistants)) or "there is none"
                raise UsageError(f"no assistant {folder} to remove", hint=f"name one of those in use: {present}")
            await self._exchange(rest)

    async def _exchange(self, chosen: tuple[Chosen, ...]) -> None:
        """Load what is new of these, then take them all at once for the answers to come."""
        check_once(chosen)
        small = None
        if chosen:
            said, before = self.options, self._small
            how = partial(align, self.backend.tokenizer, wanted=said.alignment)
            small = await asyncio.to_thread(SmallSides.load, chosen, how, device=said.device, before=before)
            self._workers.update(small.workers)
        self._chosen, self._small, self.rule = chosen, small, rule_of(chosen)

    def _about(self, prompt: Prompt, *, raw: bool) -> tuple[Backend, list[int]]:
        """The backend to ask, and the prompt's ids: none where the server renders conversations itself."""
        if isinstance(self.backend, TakesMessages):
            if raw:
                raise UsageError("this server takes messages, not text", hint="leave raw out, or with openai pass route='completions'")
            return self.backend.answering(conversation(prompt)), []
        ids = render(self.backend.tokenizer, prompt, raw=raw)
        if self._doubt is not None and not raw:
            doubt, self._doubt = self._doubt, None
            warnings.warn(doubt, TemplateWarning, stacklevel=2)
        return self.backend, ids

    async def _answer(self, prompt: Prompt, asked: Generation) -> Answer:
        check_prompt(prompt, raw=asked.raw)
        sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seed)
        capabilities = await self.capabilities()
        mode = Mode.GREEDY
        if not sampling.greedy:
            mode = Mode.PASS_THROUGH if asked.seed is None and sampling.server_can(capabilities) else Mode.MATCH
            if mode is Mode.MATCH and asked.seed is None:
                sampling = sampling.with_fresh_seed()
        said = self.options
        check_continuing(capabilities, mode, said.draft)
        backend, ids = self._about(prompt, raw=asked.raw)
        check_room(len(ids), asked.max_new_tokens, capabilities.context, whose="the model's")
        settings = Settings(
            rule=self.rule,
            assistants=tuple(map(str, self.assistants)),
            alignment="identity" if self._small is None else self._small.mode,
            sampling=sampling,
            mode=mode,
            max_new_tokens=asked.max_new_tokens,
            stop=asked.stops,
            draft=said.draft,
            on_touched=said.on_touched,
            refusal=said.refusal,
            max_retries=said.max_retries,
            trace=said.trace,
        )
        reader = None if self._small is None else self._small.reader(prompt, raw=asked.raw, new=asked.max_new_tokens)
        return Answer(backend, capabilities, settings, ids, self._ends, reader=reader)

    @spelled(Generation)
    async def stream(self, prompt: Prompt, **options: Unpack[GenerationKeywords]) -> AsyncGenerator[Piece]:
        """Verified pieces as they are ready; the last carries the result."""
        answer = await self._answer(prompt, chosen(Generation, options))
        async with aclosing(answer.run()) as pieces:
            async for piece in pieces:
                yield piece

    @spelled(Generation)
    async def generate(self, prompt: Prompt, **options: Unpack[GenerationKeywords]) -> Result:
        """One answer to a prompt: a user's message, a conversation, or (raw=True) text to go on from."""
        async with aclosing(self.stream(prompt, **options)) as pieces:
            async for piece in pieces:
                if piece.result is not None:
                    return piece.result
        raise UsageError("the stream was closed before its end", hint="keep the client open while it answers")

    @spelled(Generation)
    async def chat(self, messages: Sequence[Message], **options: Unpack[GenerationKeywords]) -> Result:
        """One answer to a conversation: [{"role": ..., "content": ...}, ...]."""
        return await self.generate(messages, **options)

    @spelled(Generation)
    async def generate_many(
        self, prompts: Sequence[Prompt], *, concurrency: int = 8, **options: Unpack[GenerationKeywords]
    ) -> list[Result]:
        """Answers in the order of the prompts, at most `concurrency` at a time, the small model in batched passes.

        The first error cancels the rest and is raised.
        """
        chosen(Generation, options, also=("concurrency",))  # what is wrong for one is wrong for all
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise UsageError(f"prompts is {type(prompts).__name__}, not a list", hint="pass a list of prompts, or call generate")
        if not isinstance(concurrency, int) or concurrency < 1:
            raise UsageError(f"concurrency is {concurrency!r}", hint="allow at least one request at a time")
        return await all_of(prompts, lambda prompt: self.generate(prompt, **options), concurrency=concurrency)

    @spelled(Scoring)
    async def score(self, prompt: Prompt, continuation: str, **options: Unpack[ScoreKeywords]) -> ScoreResult:
        """Log-probability of a given text after the prompt under the unlearned model, in nats, with bounds."""
        asked = chosen(Scoring, options)
        check_prompt(prompt, raw=asked.raw)
        if not isinstance(continuation, str):
            raise UsageError(f"the continuation is {type(continuation).__name__}, not text", hint="pass the text to score")
        utf8(continuation, what="the continuation")
        capabilities = await self.capabilities()
        backend, ids = self._about(prompt, raw=asked.raw)
        tokens = list(self.backend.tokenizer.encode(continuation, add_special_tokens=False))
        if not tokens:
            raise UsageError("the continuation is empty", hint="pass some text to score")
        check_room(len(ids), len(tokens), capabilities.context, whose="the model's")
        rule, reader = self.rule, None if self._small is None else self._small.reader(prompt, raw=asked.raw, new=len(tokens))
        score = await backend.score(ids, tokens)
        readings: list[Any] = [None] * len(tokens) if reader is None else list(await reader.along(tokens, score.positions))
        return score_continuation(score, readings, rule)

    async def close(self) -> None:
        """Close connections and the small models' threads."""
        await self.backend.aclose()
        for worker in list(self._workers):
            worker.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
