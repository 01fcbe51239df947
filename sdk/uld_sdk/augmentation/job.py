"""From a forget set to a wider one: `uld_sdk.augment(...)`, which `uld-sdk augment` calls."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

from uld_adapters.backend import Backend
from uld_adapters.errors import UsageError
from uld_offset_models.data import check_overlap
from uld_offset_models.saving import check_writable
from uld_offset_models.sources import Source
from uld_sdk.async_client import AsyncUnlearnedClient
from uld_sdk.augmentation.cache import ReplyCache
from uld_sdk.augmentation.offline import Rules
from uld_sdk.augmentation.plan import Plan
from uld_sdk.augmentation.rows import check_output, read_entries, write_files
from uld_sdk.augmentation.server import OnProgress, Server
from uld_sdk.augmentation.tasks import Proposer, fill
from uld_sdk.augmentation.wanted import AugmentResult, Wanted
from uld_sdk.waiting import finished


def augment(
    *,
    forget: Source,
    output: str | Path,
    retain: Source | None = None,
    retain_out: str | Path | None = None,
    paraphrases: int = 2,
    wrong: int = 2,
    neighbours: int | None = None,
    offline: bool = False,
    seed: int = 0,
    tries: int = 3,
    temperature: float = 0.8,
    max_new_tokens: int = 256,
    concurrency: int = 8,
    cache: str | Path | None = None,
    overwrite: bool = False,
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
) -> AugmentResult:
    """Write the forget set with paraphrases and wrong answers to `output`, and questions that must stay to `retain_out`.

    paraphrases, wrong: of question and of answer, and of wrong answers, how many a row (2); 0 leaves out those of the input, too.
    neighbours: questions that must stay, a row, with the large model's own answers (1 with `retain_out`, else 0). They follow
        the rows of `retain`.
    offline: by rules from the set itself, without a server (False).
    seed: of the rules, and of what a server is asked again; from 0 to 2**32 - 1 (0).
    tries: how often a server is asked for what a check refused, the first time included (3); after that it is left out.
    temperature: of all tries but the first, which is greedy (0.8).
    max_new_tokens: the longest reply, in tokens (256). concurrency: requests at a time (8).
    cache: file of the replies, from which an interrupted run goes on (None: the output's name and ".cache").
    on_progress: called with how many replies of how many have come in a round.

    The other options are those of `AsyncUnlearnedClient`. Raises `UsageError`, `DataError` with the line, `BackendError` and
    `SaveFailed`; files appear whole or not at all, readable by their owner only.
    """
    count = neighbours if neighbours is not None else int(retain_out is not None)
    wanted = Wanted(
        paraphrases=paraphrases, wrong=wrong, neighbours=count, seed=seed, tries=tries,
        temperature=temperature, max_new_tokens=max_new_tokens, concurrency=concurrency,
    )  # fmt: skip
    if wanted.neighbours and retain_out is None:
        raise UsageError(
            "neighbours need a retain set to go into", hint="add --retain-out R2.jsonl (retain_out=), or leave --neighbours out"
        )
    if retain_out is not None and retain is None and not wanted.neighbours:
        raise UsageError(f"nothing would go into {retain_out}", hint="add --neighbours 1 or --retain R.jsonl, or leave --retain-out out")
    if backend is None and not offline and not wanted.nothing:
        raise UsageError(
            "nothing says where the texts come from",
            hint="--backend tgi, vllm, llamacpp, openai or hf with its --base-url, or --offline for rules",
        )
    began = time.perf_counter()
    path, retain_path = Path(output).expanduser(), None if retain_out is None else Path(retain_out).expanduser()
    check_output(path, (forget, retain), overwrite=overwrite, flag="-o/--output")
    if retain_path is not None:
        check_output(retain_path, (forget, retain, path), overwrite=overwrite, flag="--retain-out")
    entries, duplicates = read_entries(forget, name="forget")
    kept, doubles = ([], 0) if retain is None else read_entries(retain, name="retain")
    check_overlap([entry.row for entry in entries], [entry.row for entry in kept])
    plan = Plan(entries, kept, wanted)
    check_writable(path)
    if retain_path is not None:
        check_writable(retain_path, hint="free some space or choose another --retain-out")
    replies = Path(cache).expanduser() if cache is not None else path.with_name(f"{path.name}.cache")
    connection = dict(
        backend=backend, base_url=base_url, model=model, tokenizer=tokenizer, api_key=api_key, timeout=timeout, max_retries=max_retries,
        http_client=http_client, top_logprobs=top_logprobs, target_device=target_device, target_dtype=target_dtype,
        route=route,
    )  # fmt: skip
    try:
        asked = (
            finished(_by_rules(plan, wanted))
            if offline or wanted.nothing
            else finished(_by_server(plan, wanted, connection, replies, on_progress))
        )
    except (Exception, KeyboardInterrupt) as error:
        if not offline and replies.is_file():
            error.add_note(f"replies so far are in {replies}: the same command goes on from there")
        raise
    files: dict[Path, Sequence[Mapping[str, Any]]] = {path: plan.forget_rows()}
    if retain_path is not None:
        files[retain_path] = plan.retain_rows()
    write_files(files)
    return AugmentResult(
        path=path,
        retain_path=retain_path,
        rows=len(entries),
        retain_rows=0 if retain_path is None else len(files[retain_path]),
        as_they_were=sum(entry.question is None for entry in entries),
        duplicates=duplicates + doubles,
        counts=plan.counts(),
        asked=asked[0],
        cached=asked[1],
        seconds=time.perf_counter() - began,
    )


async def _by_rules(plan: Plan, wanted: Wanted) -> tuple[int, int]:
    await _find(plan, Rules(plan.pairs, plan.known, seed=wanted.seed), tries=1)
    return 0, 0


async def _by_server(
    plan: Plan, wanted: Wanted, connection: dict[str, Any], cache: Path, on_progress: OnProgress | None
) -> tuple[int, int]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncUnlearnedClient(**connection))
        replies = stack.enter_context(ReplyCache(cache))
        server = Server(
            client,
            replies,
            seed=wanted.seed,
            temperature=wanted.temperature,
            max_new_tokens=wanted.max_new_tokens,
            concurrency=wanted.concurrency,
            on_progress=on_progress,
        )
        await _find(plan, server, tries=wanted.tries)
        return server.asked, server.cached


async def _find(plan: Plan, proposer: Proposer, *, tries: int) -> None:
    """Neighbours come last: they must not be paraphrases, either."""
    await fill(plan.rewordings, proposer, tries=tries)
    neighbours = plan.neighbours()
    await fill(neighbours, proposer, tries=tries)
    plan.answer(await proposer.answers([question for task in neighbours for question in task.kept]))
