"""`uld_sdk.cache(...)`, which `uld-sdk cache` calls: what the target says of the training texts, in a folder that training reads."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uld_adapters.backend import Backend, Capabilities, TakesMessages
from uld_adapters.errors import RequestRejected, UldError, UsageError
from uld_adapters.http import TALLY, Tally
from uld_adapters.vocabulary.tokens import load_tokenizer, tokenizer_fingerprint
from uld_offset_models.encoding import uses_chat_template
from uld_offset_models.saving import check_writable
from uld_offset_models.sources import Source
from uld_offset_models.store_writer import StoreWriter
from uld_offset_models.target_cache import CacheManifest, template_hash
from uld_offset_models.target_record import TargetLogprobs, pack, unpack
from uld_sdk.async_client import AsyncUnlearnedClient
from uld_sdk.caching.asking import Asking, Cost, OnProgress, tokens_of
from uld_sdk.caching.texts import Examples, Text, encode_texts, read_examples
from uld_sdk.templates import TemplateWarning, template_doubt
from uld_sdk.waiting import finished

LOCAL_TOP = 100  # log-probabilities a position of a model that runs here, which could give them all


@dataclass(frozen=True)
class CacheResult:
    """A finished cache: its folder and manifest; how many texts it has, and how many of them this run has scored.

    `tokens` are those of the answers that this run scored, `requests` its HTTP requests, those of probing the server included.
    """

    path: Path
    manifest: CacheManifest
    texts: int
    scored: int
    tokens: int
    requests: int
    seconds: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of all of it, without the shards."""
        told = {name: value for name, value in vars(self).items() if name not in {"path", "manifest"}}
        return {"path": str(self.path), **told, **self.manifest.model_dump(mode="json", exclude={"shards", "format", "rows", "finished"})}


@dataclass
class _Kept:
    """How many texts of how many are in the folder by now."""

    texts: int = 0
    of: int = 0


@dataclass(frozen=True)
class _Asked:
    """The arguments that decide what is scored, and how."""

    output: Path
    base: Any
    chat_template: bool
    max_length: int
    concurrency: int
    extend: bool
    confirm: Callable[[Cost], bool] | None
    on_progress: OnProgress | None


def cache(
    *,
    output: str | Path,
    forget: Source | None = None,
    retain: Source | None = None,
    data: Sequence[Source] = (),
    refusals: str | Path | None = None,
    base: Any = None,
    seed: int = 0,
    max_length: int = 1024,
    chat_template: bool = True,
    concurrency: int = 8,
    extend: bool = False,
    confirm: Callable[[Cost], bool] | None = None,
    on_progress: OnProgress | None = None,
    backend: str | Backend | None = None,
    base_url: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    max_retries: int = 4,
    http_client: Any = None,
    top_logprobs: int | None = None,
    target_device: str | None = None,
    target_dtype: str | None = None,
    route: Literal["chat", "completions"] | None = None,
) -> CacheResult:
    """Score the texts of a training under the large model, and keep its log-probabilities in the folder `output`.

    forget, retain: the sets of the training, in all forms that it takes; `data`: further sets. Paraphrases count, wrong answers do not.
    refusals: a text file, one a line, or "built-in": the forget questions with the refusals of `dpo` and `relabel`, too (None).
    base: the model that will be trained (folder, GGUF file or hub name), whose template renders the rows (None: the large model's).
    seed: the training's, which pairs questions and refusals (0). max_length, chat_template: the training's as well (1024, True).
    concurrency: texts at a time (8); a llama.cpp server is asked for as many as it has slots.
    extend: add to a cache of other data (False).
    confirm: called with the cost of what remains once a few texts have been scored, where a text takes more than one request; if it says
        no, the run ends there (None: go on).
    on_progress: called with how many texts of how many have been scored.

    The other options are those of `AsyncUnlearnedClient`, but that a local model (hf) gives 100 log-probabilities a position if not told
    otherwise. An interrupted run goes on when it is repeated. Raises `UsageError`, `DataError`, `TokenizerMismatch`, `BackendError`,
    `ArtifactCorrupt` and `SaveFailed`.
    """
    for name, value, least in (("concurrency", concurrency, 1), ("max_length", max_length, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} is {value!r}", hint=f"pass {name} as a whole number, {least} or more")
    if backend is None:
        raise UsageError("no backend was named", hint="--backend tgi, vllm, llamacpp, hf, or openai with --route completions")
    examples = read_examples(forget=forget, retain=retain, data=data, refusals=None if refusals is None else str(refusals), seed=seed)
    path = Path(output).expanduser()
    if not path.exists():
        check_writable(path)
    asked = _Asked(path, base, chat_template, max_length, concurrency, extend, confirm, on_progress)
    connection = dict(
        backend=backend, base_url=base_url, model=model, tokenizer=tokenizer if tokenizer is not None or backend == "hf" else base,
        api_key=api_key, timeout=timeout, max_retries=max_retries, http_client=http_client,
        top_logprobs=LOCAL_TOP if backend == "hf" and top_logprobs is None else top_logprobs,
        target_device=target_device, target_dtype=target_dtype, route=route,
    )  # fmt: skip
    kept = _Kept()
    try:
        return finished(_cache(examples, asked, connection, kept))
    except (Exception, KeyboardInterrupt) as error:
        if kept.texts:
            error.add_note(f"  {kept.texts} of {kept.of} texts are in {path}: the same command goes on from there")
        raise


async def _cache(examples: Examples, asked: _Asked, connection: dict[str, Any], kept: _Kept) -> CacheResult:
    began, tally = time.perf_counter(), Tally()
    TALLY.set(tally)
    async with AsyncUnlearnedClient(**connection) as client:
        backend = client.backend
        if isinstance(backend, TakesMessages):
            raise UsageError(
                f"a chat API scores no given text, and {backend.name} asks by messages",
                hint="with openai --route completions (route='completions') if the server has it, or --backend vllm, llamacpp or tgi",
            )
        capabilities = await client.capabilities()
        borrowed = asked.base is not None and connection["tokenizer"] is asked.base and isinstance(connection["backend"], str)
        if borrowed and (doubt := await template_doubt(backend, capabilities.model, str(asked.base))) is not None:
            warnings.warn(doubt, TemplateWarning, stacklevel=2)
        base = backend.tokenizer if asked.base is None else load_tokenizer(asked.base)
        longest = min(asked.max_length, (capabilities.context or asked.max_length + 1) - 1)  # a server scores before it writes a token
        texts = encode_texts(examples.examples, backend.tokenizer, base, chat_template=asked.chat_template, longest=longest)
        _check_sendable(backend, capabilities, texts)
        wanted = CacheManifest(
            target=capabilities.model,
            backend=backend.name,
            scoring=capabilities.scoring,
            top_logprobs=capabilities.top_logprobs,
            tokenizer_sha256=tokenizer_fingerprint(backend.tokenizer),
            template_sha256=template_hash(base, chat_template=uses_chat_template(base, wanted=asked.chat_template)),
            data=dict(examples.hashes),
        )
        with StoreWriter(asked.output, wanted, [text.row for text in texts], extend=asked.extend) as writer:
            manifest, scored = await _fill(writer, texts, backend, capabilities, asked, kept)
    return CacheResult(
        path=asked.output,
        manifest=manifest,
        texts=len(texts),
        scored=len(scored),
        tokens=tokens_of(scored),
        requests=tally.requests,
        seconds=time.perf_counter() - began,
        bytes=sum(file.stat().st_size for file in asked.output.glob("*.rows")),
    )


async def _fill(
    writer: StoreWriter[CacheManifest], texts: list[Text], backend: Backend, capabilities: Capabilities, asked: _Asked, kept: _Kept
) -> tuple[CacheManifest, list[Text]]:
    """Score what is missing, and keep each text as soon as it has come."""
    missing = set(writer.missing)
    left = [text for text in texts if text.row in missing]
    kept.texts, kept.of = len(writer.stored), len(texts)

    def keep(text: Text, values: TargetLogprobs) -> None:
        writer.put(text.row, pack(values))
        kept.texts += 1

    asking = Asking(backend, keep, concurrency=asked.concurrency, on_progress=asked.on_progress)
    if left and writer.stored:
        shortest = min((text for text in texts if text.row not in missing), key=lambda text: len(text.row.ids))
        await asking.check_same(shortest, unpack(writer.get(shortest.row)))
    if left:
        cost, rest = await asking.first(left, scoring=capabilities.scoring)
        if rest and capabilities.scoring != "prompt" and asked.confirm is not None and not asked.confirm(cost):
            raise UldError("nothing more is scored, as you wish", hint="the same command goes on from here")
        await asking.all(rest, of=len(left))
    return (writer.finish() if left or not writer.manifest.finished else writer.manifest), left


def _check_sendable(backend: Backend, capabilities: Capabilities, texts: list[Text]) -> None:
    """A server that takes no ids must split texts like the tokenizer; raises `RequestRejected`.

    All of a text where it is scored in one request, else every beginning of it.
    """
    if capabilities.ids_in:
        return

    def fits(text: Text) -> bool:
        whole = [*text.prompt, *text.row.answer]
        if capabilities.scoring == "prompt" and backend.resume(whole) == whole:
            return True
        return all((part := whole[:end]) == backend.resume(part) for end in range(len(text.prompt), len(whole)))

    unfit = [text.place for text in texts if not fits(text)]
    if unfit:
        raise RequestRejected(
            f"{backend.name} takes text only, and splits {len(unfit)} of {len(texts)} texts in its own way: {', '.join(unfit[:3])}",
            hint="take these rows out, or use a server that takes token ids (vLLM, llama.cpp)",
        )
