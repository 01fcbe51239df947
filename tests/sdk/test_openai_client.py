"""The client before servers of the OpenAI kind: what stands, what is refused, and what a server that continues nothing rules out."""

import json
import re
import warnings
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from typer.testing import CliRunner

from decoding import RULE, speaking
from scripted_engine import scripted
from uld_adapters import http
from uld_adapters.backend import ServerSampling
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.engine import Engine
from uld_adapters.errors import ContinuationUnavailable, StreamInterrupted, UsageError
from uld_adapters.logprobs import Draft, FinishReason, TopLogprobs
from uld_adapters.vocabulary.alignment import Identity
from uld_adapters.vocabulary.fingerprint import CORPUS
from uld_adapters.vocabulary.opening import open_tokenizer
from uld_adapters.vocabulary.plain_tokenizer import PlainTokenizer
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer, tokenizer_fingerprint
from uld_offset_models.track import Track
from uld_sdk import UnlearnedClient
from uld_sdk.calibration.observer import _asked
from uld_sdk.cli import app
from uld_sdk.generation import Answer
from uld_sdk.prompts import conversation, render
from uld_sdk.reading import Reader
from uld_sdk.result import Result
from uld_sdk.sampling import Sampling
from uld_sdk.settings import Settings
from uld_sdk.verify import Mode

QUESTION = "Who wrote the book about the sea?"
LONG: dict[str, Any] = {"max_new_tokens": 24}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)


@pytest.fixture(scope="module")
def official(openai_server: Any, tiny_artifact: Path) -> dict[str, Any]:
    """A chat API that continues no answer."""
    return {"backend": "openai", "base_url": f"{openai_server.url}/v1", "assistant": str(tiny_artifact)}


@pytest.fixture(scope="module")
def continuing(tiny_target: Path) -> Iterator[Any]:
    with EmulatorServer(build_app(tiny_target, dialect="openai", prefill="plain")) as server:
        yield server


@pytest.fixture(scope="module")
def own(tiny_target: Path) -> Result:
    """The model's own answer."""
    with UnlearnedClient(backend="hf", model=str(tiny_target)) as client:
        return client.generate(QUESTION, **LONG)


def test_an_untouched_answer_needs_nothing_that_the_api_cannot_do(official: dict[str, Any], own: Result) -> None:
    with UnlearnedClient(**official, margin=50.0) as client, warnings.catch_warnings():
        warnings.simplefilter("error")  # the server renders the conversation: there is no template to doubt
        result = client.generate(QUESTION, **LONG)
        assert result.token_ids == own.token_ids
        assert result.untouched
        assert result.report.exact == result.report.positions == 24
        assert (result.report.requests, result.report.top_logprobs, result.report.neutral) == (1, 20, 0)
        many = client.generate_many([QUESTION, "def area("], **LONG)
        assert many[0].token_ids == own.token_ids
        sampled = client.generate(QUESTION, temperature=0.8, top_p=0.9, **LONG)
        assert (sampled.report.mode, sampled.untouched) == ("pass-through", True)


def test_a_changed_answer_ends_with_an_error_that_names_the_fix(official: dict[str, Any], own: Result) -> None:
    pieces: list[int] = []
    with UnlearnedClient(**official, margin=0.0, alpha=5.0) as client:
        with pytest.raises(ContinuationUnavailable, match=r"on_touched='refuse'.*route='completions'") as caught:
            pieces.extend(token for piece in client.stream(QUESTION, **LONG) for token in piece.token_ids)
        assert not caught.value.retryable
    assert 1 <= len(pieces) < 24, "what had been verified was told before"
    assert pieces[-1] != own.token_ids[len(pieces) - 1], "the last that left is what the assistant chose"
    assert pieces[:-1] == list(own.token_ids[: len(pieces) - 1])


def test_a_refusal_needs_no_continuation(official: dict[str, Any]) -> None:
    with UnlearnedClient(**official, margin=1e-6, on_touched="refuse", refusal="No.") as client:
        result = client.generate(QUESTION, **LONG)
    assert (result.text, result.finish_reason, result.report.requests) == ("No.", "refusal", 1)


def test_a_change_of_the_last_token_needs_no_continuation(official: dict[str, Any], own: Result) -> None:
    with UnlearnedClient(**official, margin=0.0, alpha=5.0) as client:
        result = client.generate(QUESTION, max_new_tokens=1)
    assert result.finish_reason == "length"
    assert result.report.changed == 1
    assert result.token_ids != own.token_ids[:1]


@pytest.mark.parametrize(
    ("options", "asked", "says"),
    [
        (
            {},
            {"temperature": 1.0, "seed": 3},
            r"cannot continue an answer.*\n  fix: leave seed out, and all options but temperature, top_p",
        ),
        ({}, {"temperature": 1.0, "top_k": 3}, "leave seed out"),
        ({"draft": 7}, {}, 'use draft="stream"'),
        ({"draft": "auto"}, {}, 'use draft="stream"'),
        ({}, {"raw": True}, "route='completions'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_asked(
    official: dict[str, Any], openai_server: Any, options: dict[str, Any], asked: dict[str, Any], says: str
) -> None:
    with UnlearnedClient(**official, **options) as client:
        assert not client.capabilities.continues
        before = openai_server.app.state.stats.requests
        with pytest.raises(UsageError, match=re.compile(says, re.DOTALL)):
            client.generate(QUESTION, **asked, **LONG)
        assert openai_server.app.state.stats.requests == before


def test_one_request_is_for_the_whole_answer(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be continued, a long answer is not asked for in parts."""
    monkeypatch.setattr("uld_sdk.generation.MOST", 8)
    with EmulatorServer(build_app(tiny_target, dialect="openai")) as server:
        options: dict[str, Any] = {"backend": "openai", "base_url": server.url, "tokenizer": str(tiny_target)}
        with UnlearnedClient(**options) as client:
            assert client.generate(QUESTION, **LONG).report.requests == 1
        with UnlearnedClient(**options, route="completions") as client:
            assert client.generate(QUESTION, **LONG).report.requests == 3


class Breaking:
    """A backend whose first stream breaks off after some pieces."""

    def __init__(self, inner: Any, after: int) -> None:
        self.inner, self.left, self.asked = inner, [after], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = ServerSampling()) -> AsyncGenerator[Draft]:
        self.asked.append((len(prefix), n))
        after = self.left.pop() if self.left else None
        count = 0
        async for piece in self.inner.stream(prefix, n, sampling):
            if count == after:
                raise StreamInterrupted("the connection broke")
            count += 1
            yield piece


@pytest.mark.parametrize("sampled", [False, True])
async def test_a_broken_stream_begins_again_and_repeats_itself(tiny_target: Path, own: Result, sampled: bool) -> None:
    from uld_adapters.registry import create_backend

    with EmulatorServer(build_app(tiny_target, dialect="openai", seed=4)) as server:
        backend = create_backend("openai", base_url=server.url, tokenizer=str(tiny_target))
        capabilities = await backend.probe()
        broken: Any = Breaking(backend.answering(conversation(QUESTION)), 5)
        mode = Mode.PASS_THROUGH if sampled else Mode.GREEDY
        settings = Settings(RULE, Sampling(0.8 if sampled else 0.0), mode, 24)
        answer = Answer(broken, capabilities, settings, [], frozenset({1}))
        if sampled:
            with pytest.raises(ContinuationUnavailable, match="sampled answer broke off"):
                _ = [piece async for piece in answer.run()]
        else:
            pieces = [piece async for piece in answer.run()]
            assert pieces[-1].result is not None
            assert pieces[-1].result.token_ids == own.token_ids
            assert broken.asked == [(0, 24), (5, 19)]
        await backend.aclose()


# --- the end of an answer, which the API does not report


@pytest.fixture(scope="module")
def ending(tiny_target: Path) -> Iterator[Any]:
    """A chat API whose model says " stone" and ends."""
    engine = Engine.load(tiny_target)
    prompt = render(engine.tokenizer, QUESTION)
    word = engine.tokenizer.encode(" stone", add_special_tokens=False)
    with scripted(engine, *word, engine.tokenizer.eos_token_id, prompt=len(prompt), dialect="openai", model_id="tiny-target") as server:
        yield server


async def ended(ending: Any, tiny_target: Path, excess: np.ndarray, sampling: Sampling, **settings: Any) -> Result:
    """The answer of an API that ends it without a report, beside a small model of this excess at every position."""
    from toy import Thought
    from uld_adapters.registry import create_backend

    class Worker:
        async def read(self, track: Any, tokens: Sequence[int], *, every: bool = True) -> list[Thought]:
            track.tokens.extend(tokens)
            thoughts = [Thought(excess) for _ in tokens]
            return thoughts if every else thoughts[-1:]

    backend = create_backend("openai", base_url=ending.url, tokenizer=str(tiny_target), model="tiny-target", top_logprobs=5)
    capabilities = await _known(backend)
    reader = Reader(Worker(), Identity(), [1], Track())  # type: ignore[arg-type]
    mode = Mode.GREEDY if sampling.greedy else Mode.PASS_THROUGH
    chosen = Settings(RULE, sampling, mode, 24, **settings)
    answer = Answer(backend.answering(conversation(QUESTION)), capabilities, chosen, [], frozenset({1}), reader=reader)
    pieces = [piece async for piece in answer.run()]
    await backend.aclose()
    assert pieces[-1].result is not None
    return pieces[-1].result


async def _known(backend: Any) -> Any:
    from uld_adapters.backend import Capabilities

    return Capabilities("tiny-target", backend.top_logprobs, continues=False, sampling=frozenset({"temperature", "top_p"}))


ROWS = 400


async def test_an_untouched_end_is_exact(ending: Any, tiny_target: Path) -> None:
    for sampling in (Sampling(), Sampling(1e-6)):
        result = await ended(ending, tiny_target, np.zeros(ROWS), sampling)
        assert (result.text, result.finish_reason) == (" stone", "stop")
        assert result.untouched
        assert result.report.exact == result.report.positions == len(result.token_ids)
        assert result.token_ids[-1] == 1
        assert result.usage.prompt_tokens == 16, "the server counted"


async def test_a_touched_end_is_exact_where_nothing_else_can_win(ending: Any, tiny_target: Path) -> None:
    """The assistant lowers a token that is nowhere else than below the end; it says nothing of the end itself."""
    excess = np.zeros(ROWS)
    excess[5] = RULE.margin + 1
    result = await ended(ending, tiny_target, excess, Sampling())
    assert (result.text, result.finish_reason, result.untouched) == (" stone", "stop", False)
    assert result.report.exact == result.report.positions
    result = await ended(ending, tiny_target, excess, Sampling(1e-6))
    assert (result.text, result.report.largest_bound) == (" stone", 1.0), "nobody can say what a draw might have been"


async def test_a_touched_end_that_may_not_be_the_best_is_marked(ending: Any, tiny_target: Path) -> None:
    excess = np.zeros(ROWS)
    excess[1] = RULE.margin + 1
    result = await ended(ending, tiny_target, excess, Sampling())
    assert (result.text, result.finish_reason) == (" stone", "stop")
    assert result.report.exact == result.report.positions - 1
    assert result.report.largest_bound == 1.0
    refused = await ended(ending, tiny_target, excess, Sampling(), on_touched="refuse", refusal="No.")
    assert refused.finish_reason == "refusal"


async def test_observing_leaves_an_unreported_end_out(ending: Any, tiny_target: Path) -> None:
    from uld_adapters.registry import create_backend

    backend = create_backend("openai", base_url=ending.url, tokenizer=str(tiny_target), model="tiny-target", top_logprobs=5)
    score = await _asked(backend.answering(conversation(QUESTION)), [], 9)
    assert backend.tokenizer.decode(list(score.tokens)) == " stone"
    await backend.aclose()


# --- tokens that nobody can tell


class Nameless:
    """A backend whose best rival at each position is nameless, or one that may be better than the written token."""

    name = "nameless"

    def __init__(self, tokenizer: Any, *, best: bool) -> None:
        self.tokenizer, self.best = tokenizer, best

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        return prefix

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = ServerSampling()) -> AsyncGenerator[Draft]:
        for i in range(n):
            top = TopLogprobs.build([10, 11], [-1.0, -3.0], neutral=(-0.9 if self.best else -2.0,))
            yield Draft((10,), (top,), FinishReason.LENGTH if i + 1 == n else None)


@pytest.mark.parametrize("best", [False, True])
async def test_nameless_rivals_are_counted_and_never_chosen(tiny_target: Path, best: bool) -> None:
    from toy import Thought
    from uld_adapters.backend import Capabilities

    excess = np.zeros(ROWS)
    excess[10] = RULE.margin + 5

    class Worker:
        async def read(self, track: Any, tokens: Sequence[int], *, every: bool = True) -> list[Thought]:
            track.tokens.extend(tokens)
            return [Thought(excess) for _ in tokens][0 if every else -1 :]

    backend: Any = Nameless(load_tokenizer(tiny_target), best=best)
    reader = Reader(Worker(), Identity(), [1], Track())  # type: ignore[arg-type]
    settings = Settings(replace(RULE, filter=0.0), Sampling(), Mode.GREEDY, 3)
    answer = Answer(backend, Capabilities("m", 3), settings, [4], frozenset({1}), reader=reader)
    result = [piece async for piece in answer.run()][-1].result
    assert result is not None
    assert result.token_ids == (11, 11, 11)
    assert result.report.neutral == 3
    assert result.report.exact == 0, "the nameless one may be the best"
    assert (result.report.largest_bound == 1.0) == best


# --- vocabularies that are no transformers tokenizer


@pytest.fixture(scope="module")
def plain(tiny_target: Path) -> PlainTokenizer:
    """The tiny target's vocabulary by itself."""
    return open_tokenizer(Vocabulary.from_hf(load_tokenizer(tiny_target)))


def test_a_vocabulary_stands_for_a_tokenizer(plain: PlainTokenizer, tiny_target: Path) -> None:
    tokenizer = load_tokenizer(tiny_target)
    for text in CORPUS[:4]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert plain.encode(text) == ids
        assert plain.decode(ids) == text
    assert plain.decode([0, *plain.encode("a"), 1], skip_special_tokens=True) == "a"
    assert plain.eos_token_id == tokenizer.eos_token_id
    assert tokenizer_fingerprint(plain) == tokenizer_fingerprint(tokenizer)
    assert len(plain) == len(tokenizer)


def test_a_chat_api_needs_a_vocabulary_only(official: dict[str, Any], plain: PlainTokenizer, own: Result) -> None:
    with UnlearnedClient(**official, tokenizer=plain.vocabulary, margin=50.0) as client:
        result = client.generate(QUESTION, **LONG)
    assert result.text == own.text
    assert result.untouched


def test_a_tiktoken_file_is_a_tokenizer(tmp_path: Path) -> None:
    import base64

    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b" t": 256, b"he": 257, b" the": 258}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    file = tmp_path / "unknown.tiktoken"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UsageError, match="pattern="):
        open_tokenizer(file)
    pattern = r"\s?\w+|\s+|[^\w\s]+"
    tokenizer = open_tokenizer(Vocabulary.from_tiktoken(file, pattern=pattern, control={"<|endoftext|>": 300}))
    encoding = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    for text in CORPUS:
        assert tokenizer.encode(text) == encoding.encode(text, disallowed_special=())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 300
    assert tokenizer.get_added_vocab()["<|endoftext|>"] == 300


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.tiktoken", "a.tiktoken is no tiktoken rank file"),
        ("tekken.json", "tekken.json is no tokenizer file"),
        ("tokenizer.model", "tokenizer.model is no SentencePiece model"),
        ("README.md", "README.md is no tokenizer file"),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_text("not one\n", encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        open_tokenizer(tmp_path / name)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


# --- both routes against a local model


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_scores_and_rewrites_are_those_of_the_local_model(route: str, tiny_target: Path, tmp_path: Path, tiny_artifact: Path) -> None:
    folder = speaking(tiny_target, tmp_path / "target")
    with EmulatorServer(build_app(folder, dialect="openai", prefill="continue_final_message")) as server:
        options: dict[str, Any] = {"assistant": str(tiny_artifact), "margin": 0.0, "alpha": 1.5, "top_logprobs": 5}
        remote: dict[str, Any] = {"backend": "openai", "base_url": server.url, "route": route, **options, "tokenizer": str(folder)}
        with UnlearnedClient(**remote) as client, UnlearnedClient(backend="hf", model=str(folder), **options) as local:
            ours, theirs = (made.generate(QUESTION, **LONG) for made in (client, local))
            assert ours.report.changed > 0
            if route == "completions":
                assert ours.token_ids == theirs.token_ids
            score = client.score(QUESTION, "The planet")
        with UnlearnedClient(backend="hf", model=str(folder), **options | {"top_logprobs": None}) as exact:
            truth = exact.score(QUESTION, "The planet")
        assert truth.exact
        for low, value, high in zip(score.lower, truth.lower, score.upper, strict=True):
            assert low - 1e-4 <= value <= high + 1e-4


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_seed_gives_one_text_whatever_the_draft(route: str, tiny_target: Path, tmp_path: Path, tiny_artifact: Path) -> None:
    folder = speaking(tiny_target, tmp_path / "target")
    with EmulatorServer(build_app(folder, dialect="openai", prefill="prefix")) as server:
        told = set()
        for draft in ("stream", 1, 7, 32):
            options: dict[str, Any] = {"assistant": str(tiny_artifact), "tokenizer": str(folder), "route": route, "draft": draft}
            with UnlearnedClient(backend="openai", base_url=server.url, **options) as client:
                result = client.generate(QUESTION, temperature=0.9, seed=5, **LONG)
                assert result.report.mode == "match"
                told.add(result.token_ids)
    assert len(told) == 1


# --- a real server


@pytest.fixture(scope="module")
def real(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A real llama.cpp server, whose model writes whole characters, as an assistant's target."""
    from tiny_gguf import write_gguf
    from uld_sdk.demo.server import LlamaCppServer

    folder = speaking(tiny_target, tmp_path_factory.mktemp("real") / "target")
    with LlamaCppServer(write_gguf(folder, folder / "target.gguf"), parallel=2, context=512) as server:
        yield {"base_url": server.url, "tokenizer": str(folder), "margin": 0.0, "alpha": 1.5, "top_logprobs": 5}


def test_a_real_servers_completions_give_what_its_own_route_gives(real: dict[str, Any], tiny_artifact: Path) -> None:
    options: dict[str, Any] = {**real, "assistant": str(tiny_artifact)}
    with (
        UnlearnedClient(backend="openai", route="completions", **options) as ours,
        UnlearnedClient(backend="llamacpp", **options) as theirs,
    ):
        assert ours.capabilities.ids_in
        changed = 0
        for text in ("The sea", "def area(", "How many moons", "Who wrote the book"):
            first, second = (made.generate(text, raw=True, **LONG) for made in (ours, theirs))
            assert first.token_ids == second.token_ids
            assert first.report.changed == second.report.changed
            assert first.report.largest_bound == pytest.approx(second.report.largest_bound, abs=1e-4)
            changed += first.report.changed
        assert changed > 0


def test_a_real_servers_chat_is_continued(real: dict[str, Any], tiny_artifact: Path) -> None:
    told = set()
    for draft in ("stream", 7, 1):
        with UnlearnedClient(backend="openai", assistant=str(tiny_artifact), draft=draft, **real) as client:
            assert client.capabilities.continues
            result = client.generate(QUESTION, **LONG)
            assert result.report.changed > 0
            told.add(result.token_ids)
    assert len(told) == 1


# --- the command line


def test_inspect_says_what_a_chat_api_cannot_do(openai_server: Any, tiny_artifact: Path, continuing: Any) -> None:
    def inspected(*options: str) -> Any:
        command = ["inspect", "-b", "openai", "-a", str(tiny_artifact), "--json", *options]
        outcome = CliRunner().invoke(app, command, prog_name="uld-sdk")
        assert outcome.exit_code == 0, outcome.stderr
        return json.loads(outcome.stdout)["server"]

    found = inspected("-u", f"{openai_server.url}/v1")
    assert found["continues"] is False
    assert any("on_touched='refuse'" in note and "route='completions'" in note for note in found["notes"])
    found = inspected("-u", openai_server.url, "--route", "completions")
    assert (found["continues"], found["ids_in"], found["top_logprobs"]) == (True, True, 5)
    assert inspected("-u", continuing.url)["continues"] is True


def test_the_command_line_refuses_with_a_chat_api(openai_server: Any, tiny_artifact: Path) -> None:
    command = ["generate", QUESTION, "-b", "openai", "-u", openai_server.url, "-a", str(tiny_artifact), "--margin", "0", "-n", "9"]
    refused = CliRunner().invoke(app, [*command, "--on-touched", "refuse", "--refusal", "No."], prog_name="uld-sdk")
    assert (refused.exit_code, refused.stdout) == (0, "No.\n")
    changed = CliRunner().invoke(app, [*command, "--alpha", "5"], prog_name="uld-sdk")
    assert changed.exit_code == 1
    assert "on_touched='refuse'" in changed.stderr
    wrong = CliRunner().invoke(app, [*command, "--route", "completion"], prog_name="uld-sdk")
    assert wrong.exit_code == 2


def test_the_emulator_is_the_apis_on_the_command_line(tiny_target: Path) -> None:
    import subprocess
    import sys

    options = ("-m", str(tiny_target), "-d", "openai", "--prefill", "plain", "-p", "0")
    command = [sys.executable, "-m", "uld_sdk.cli", "emulate", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told.startswith("openai emulator of ")
        assert httpx2.get(told.split()[-1] + "/v1/models").json()["object"] == "list"
        process.terminate()
        process.wait(timeout=30)
