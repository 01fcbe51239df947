"""The backend for servers of the OpenAI kind: recorded answers, streams that cannot be trusted, and the first look at a server."""

import json
import os
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from scripted_engine import scripted
from uld_adapters import http
from uld_adapters.backend import ServerSampling
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.engine import Engine
from uld_adapters.errors import (
    AuthenticationFailed,
    ContinuationUnavailable,
    LogprobsUnavailable,
    MalformedAnswer,
    ModelNotFound,
    RequestRejected,
    StreamInterrupted,
    TokenizerMismatch,
    UnknownName,
    UsageError,
)
from uld_adapters.logprobs import FinishReason, TopLogprobs
from uld_adapters.openai.names import Named, Told, chat_positions, completion_positions
from uld_adapters.openai.server import DRAWS, alike
from uld_adapters.openai.transcript import Transcript
from uld_adapters.registry import create_backend
from uld_adapters.served import CapabilityWarning
from uld_adapters.vocabulary.by_bytes import TokensByBytes
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer

RECORDED = Path(os.environ.get("ULD_SHARED", Path(__file__).parents[3] / "shared")) / "servers" / "recorded"
needs_recordings = pytest.mark.skipif(not RECORDED.is_dir(), reason="needs the recorded answers (ULD_SHARED)")
QUESTION = [{"role": "user", "content": "Who wrote the book about the sea?"}]
MODEL = "tiny-target"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))["response"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> Engine:
    return Engine.load(tiny_target)


# --- how tokens are told


@needs_recordings
def test_the_recorded_chat_of_vllm_names_ids() -> None:
    positions = chat_positions(recorded("vllm_chat")["choices"][0]["logprobs"])
    assert [told.token.id for told in positions] == [1974, 1875, 1279]
    assert [named.id for named in positions[0].top] == [1974, 830, 1275]


@needs_recordings
def test_the_recorded_chat_of_llamacpp_tells_ids_and_bytes() -> None:
    positions = chat_positions(recorded("llamacpp_v1_chat")["choices"][0]["logprobs"])
    assert [(told.token.id, told.token.data) for told in positions] == [(1364, b" ref"), (1570, b"point"), (663, b" class")]
    half = positions[0].top[-1]
    assert (half.id, half.data) == (256, b"\xa0"), "its string is U+FFFD"


@needs_recordings
def test_the_recorded_chat_of_llamacpppython_tells_strings() -> None:
    positions = chat_positions(recorded("llamacpppython_chat")["choices"][0]["logprobs"])
    assert [told.token.data for told in positions] == [b" ref", b"point", b" class"]
    assert positions[0].top[-1] == Named(pytest.approx(-3.0976700), None, None), "an empty string names no token"


@needs_recordings
@pytest.mark.parametrize("name", ["vllm_completions_text", "llamacpppython_completions", "sglang_v1_completions"])
def test_recorded_completions_tell_strings(name: str) -> None:
    told, names, _ = completion_positions(recorded(name)["choices"][0]["logprobs"])
    assert [position.token.data for position in told] == [b"main", b"text", b" at", b" range"]
    assert told[0].token.logprob == pytest.approx(-0.5298, abs=1e-3)
    assert names == ["main", "text", " at", " range"]
    nameless = [named for named in told[0].top if named.data is None]
    assert len(nameless) == (0 if name.startswith("sglang") else 1)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bytes:\\xe6\\x9d", b"\xe6\x9d"),
        ("bytes: \\xf0\\x9f", b" \xf0\x9f"),
        ("é", "é".encode()),
        ("\ufffd", None),
        ("a\ufffd", None),
        ("", None),
        ("<|eos|>", b"<|eos|>"),
    ],
)
def test_strings_of_completions(name: str, data: bytes | None) -> None:
    report = {"tokens": [name], "token_logprobs": [-1.0], "top_logprobs": [{name: -1.0}], "text_offset": [0]}
    (told,), _, _ = completion_positions(report)
    assert told.token == Named(-1.0, data)
    entry = {"token": name, "logprob": -1.0, "bytes": None, "top_logprobs": []}
    (told,) = chat_positions({"content": [entry]})
    assert told.token == Named(-1.0, data)


def test_bytes_that_spell_the_replacement_character_tell_nothing() -> None:
    entry = {"token": "\ufffd", "logprob": -9999.0, "bytes": [239, 191, 189], "top_logprobs": []}
    assert chat_positions({"content": [entry]})[0].token == Named(None, None)


# --- ids out of them

WORDS = (b"a", b"b", b" c", b"\xe6", b"\x9d", b"\xb1", b"\xe6\x9d", b"\xb1x", b"<|end|>", b"b", "東".encode())
TOKENS = TokensByBytes(Vocabulary(WORDS, frozenset({8}), "toy"))


def told(*names: tuple[bytes | None, float]) -> Told:
    """A position whose written token is the first of the named ones."""
    entries = tuple(Named(logprob, data) for data, logprob in names)
    return Told(entries[0], entries)


def test_ids_are_found_by_bytes_and_rivals_that_nobody_can_tell_are_neutral() -> None:
    transcript = Transcript(TOKENS, 4)
    ((token, top),) = transcript.push([told((b"a", -0.5), (None, -1.5), (None, -2.0), (b"\xe6", -3.0))], "a")
    assert token == 0
    assert top.ids.tolist() == [0, 3]
    assert top.neutral == (-1.5, -2.0)
    assert top.ceiling == -1.5
    assert not top.overshadowed


def test_tokens_of_the_same_bytes_add_up() -> None:
    ((_, top),) = Transcript(TOKENS, 3).push([told((b"a", -0.5), (b"b", -2.0), (b"b", -3.0))], "a")
    assert top.ids.tolist() == [0, 1]
    assert top.logprobs[1] == pytest.approx(np.logaddexp(-2.0, -3.0))
    ((_, top),) = Transcript(TOKENS, 3).push([told((b"a", -0.5), (b"b", -2.0), (b"b", -2.0))], "a")
    assert top.logprobs[1] == -2.0, "one token told twice"


def test_names_that_became_one_leave_the_tail_open() -> None:
    """Completions tell rivals by name: of two half characters one is left, and which, nobody knows."""
    ((_, top),) = Transcript(TOKENS, 5).push([told((b"a", -1.0), (None, -3.0), (b"b", -4.0))], "a")
    tail = np.log(1 - np.exp([-1.0, -3.0, -4.0]).sum())
    assert top.neutral == pytest.approx((-3.0, tail, tail))
    assert top.overshadowed == (tail > -1.0)


def test_a_control_token_without_a_counterpart_is_neutral() -> None:
    ((_, top),) = Transcript(TOKENS, 3).push([told((b"a", -0.5), (b"<|call|>", -2.0), (b"<|end|>", -3.0))], "a")
    assert top.ids.tolist() == [0, 8]
    assert top.neutral == (-2.0,)


def test_a_word_that_is_no_token_is_another_tokenizers() -> None:
    with pytest.raises(TokenizerMismatch, match="tokenizer=") as caught:
        Transcript(TOKENS, 2).push([told((b"a", -0.5), (b"ab", -2.0))], "a")
    assert "b'ab'" in str(caught.value)
    with pytest.raises(TokenizerMismatch, match="the id 99"):
        Transcript(TOKENS, 1).push([Told(Named(-0.5, None, 99), (Named(-0.5, None, 99),))], "a")
    with pytest.raises(TokenizerMismatch, match="the id 1"):
        Transcript(TOKENS, 1).push([Told(Named(-0.5, b"a", 1), (Named(-0.5, b"a", 1),))], "a")


def test_ids_count_where_they_are_told() -> None:
    ((token, top),) = Transcript(TOKENS, 2).push([Told(Named(-0.5, b"b", 9), (Named(-0.5, b"b", 9), Named(-1.0, b"b", 1)))], "b")
    assert token == 9
    assert top.ids.tolist() == [9, 1]


def test_half_characters_without_bytes_are_what_completes_them() -> None:
    half = told((None, -0.5), (b"a", -1.0))
    whole = Transcript(TOKENS, 2)
    assert whole.push([half], "") == []
    assert whole.push([half], "") == []
    found = whole.push([told((None, -0.5), (b"a", -1.0)), told((b"b", -0.5), (b"a", -1.0))], "東b")
    assert [token for token, _ in found] == [3, 4, 5, 1]
    assert all(top.neutral == () for _, top in found), "the written token itself is known by now"
    assert found[0][1].of(3) == -0.5


def test_a_character_may_be_told_with_its_last_token() -> None:
    """vLLM spells the token that completes a character as the whole character."""
    transcript = Transcript(TOKENS, 2)
    half = told((None, -0.5), (b"a", -1.0))
    assert transcript.push([half, half], "") == []
    found = transcript.push([told(("東".encode(), -0.4), (b"a", -1.0))], "東")
    assert [token for token, _ in found] == [3, 4, 5]
    assert found[2][1].of(5) == -0.4, "not the token that is the whole character"
    ((token, _),) = Transcript(TOKENS, 2).push([told(("東".encode(), -0.4), (b"a", -1.0))], "東")
    assert token == 10


def test_half_characters_that_split_in_several_ways_raise() -> None:
    transcript = Transcript(TOKENS, 2)
    half = told((None, -0.5), (b"a", -1.0))
    with pytest.raises(MalformedAnswer, match=r"2 tokens by U\+FFFD alone; .* in no possible ways"):
        transcript.push([half, half], "é")
    two = TokensByBytes(Vocabulary((*WORDS, b"\x9d\xb1"), frozenset({8}), "toy"))
    with pytest.raises(MalformedAnswer, match="several possible ways"):
        Transcript(two, 2).push([half, half], "東")


def test_tokens_and_text_must_say_the_same() -> None:
    with pytest.raises(MalformedAnswer, match="'b' where its text says 'c'"):
        Transcript(TOKENS, 1).push([told((b"a", -0.5)), told((b"b", -0.5))], "ac")
    with pytest.raises(LogprobsUnavailable, match="'b' without log-probabilities"):
        Transcript(TOKENS, 1).push([told((b"a", -0.5))], "ab")
    spaced = Transcript(TOKENS, 1)
    assert spaced.push([told((b" c", -0.5))], "c"), "a dummy space before the first word"
    with pytest.raises(MalformedAnswer):
        spaced.push([told((b" c", -0.5))], "c")


def test_an_answer_may_be_cut_off_inside_a_character() -> None:
    transcript = Transcript(TOKENS, 1)
    assert [token for token, _ in transcript.push([told((b"a", -0.5)), told((b"\xe6", -0.5))], "a\ufffd")] == [0, 3]
    assert not transcript.close()
    held = Transcript(TOKENS, 1)
    held.push([told((b"\xe6", -0.5))], "")
    held.push([told((b"\x9d", -0.5)), told((b"\xb1", -0.5))], "東")
    assert not held.close()
    broken = Transcript(TOKENS, 1)
    broken.push([told((b"\xe6", -0.5))], "\ufffd")
    with pytest.raises(MalformedAnswer, match="where its text says"):
        broken.push([told((b"\x9d", -0.5)), told((b"\xb1", -0.5))], "\ufffd\ufffd")


def test_reports_of_one_position_are_known() -> None:
    one = TopLogprobs.build([1, 2, 3], [-1.0, -2.0, -3.0])
    assert alike(one, TopLogprobs.build([1, 2, 4], [-1.1, -1.9, -3.1]))
    assert not alike(one, TopLogprobs.build([1, 2, 3], [-1.0, -2.5, -3.0]))
    assert not alike(one, TopLogprobs.build([1, 5, 6], [-1.0, -2.0, -3.0]))
    assert not alike(one, TopLogprobs.unreported())


# --- streams, replayed

Replay = Callable[..., tuple[Any, list[dict[str, Any]], list[str]]]


@pytest.fixture
async def make(tiny_target: Path) -> AsyncIterator[Replay]:
    """Makes a backend whose server gives these answers in turn (the last again and again), with the bodies and paths it was sent."""
    clients = []

    def build(*answers: tuple[int, str], route: str = "chat", **options: Any) -> tuple[Any, list[dict[str, Any]], list[str]]:
        bodies: list[dict[str, Any]] = []
        paths: list[str] = []
        left = list(answers)

        def handle(request: httpx2.Request) -> httpx2.Response:
            bodies.append(json.loads(request.content) if request.content else {})
            paths.append(str(request.url))
            status, text = left.pop(0) if len(left) > 1 else left[0]
            return httpx2.Response(status, text=text)

        client = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
        clients.append(client)
        given = {"base_url": "http://server", "tokenizer": str(tiny_target), "http_client": client, "top_logprobs": 2, "model": "m"}
        backend = create_backend("openai", route=route, **given | options)
        return backend.answering(QUESTION) if route == "chat" else backend, bodies, paths

    yield build
    for client in clients:
        await client.aclose()


def entry(token: str, logprob: float, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **more}


def chunk(*words: str, text: str | None = None, reason: str | None = None, **choice: Any) -> str:
    """One event of a chat stream: a position a word, its rival "Z"."""
    content = [entry(word, -0.3, top_logprobs=[entry(word, -0.3), entry("Z", -2.0)]) for word in words]
    said = {"content": "".join(words) if text is None else text} if words or text else {}
    whole = {"index": 0, "delta": said, "logprobs": {"content": content} if content else None, "finish_reason": reason} | choice
    return f"data: {json.dumps({'choices': [whole]})}\n\n"


def counted(completion: int, prompt: int = 7, **more: Any) -> str:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion} | more
    return f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"


DONE = "data: [DONE]\n\n"


async def test_a_chat_stream_is_read(make: Replay, tiny_target: Path) -> None:
    answer = chunk(text="") + chunk("t") + chunk("h", "e") + chunk(reason="length") + counted(3) + DONE
    backend, bodies, paths = make((200, answer))
    draft = await backend.draft((), 3)
    assert load_tokenizer(tiny_target).decode(list(draft.tokens)) == "the"
    assert [top.ids.size for top in draft.positions] == [2, 2, 2]
    assert draft.finish is FinishReason.LENGTH
    assert paths == ["http://server/v1/chat/completions"]
    (body,) = bodies
    assert body["messages"] == QUESTION
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["temperature"]) == (True, 2, 3, 0.0)
    assert body["stream_options"] == {"include_usage": True}
    assert not {"top_k", "min_p", "repetition_penalty", "continue_final_message"} & set(body), "the API refuses what it does not know"


async def test_an_end_that_is_not_reported_is_an_end_without_a_report(make: Replay) -> None:
    for total in (1, 2):
        backend, _, _ = make((200, chunk("t") + chunk(reason="stop") + counted(total) + DONE))
        draft = await backend.draft((), 5)
        assert draft.tokens[1:] == (backend.tokenizer.eos_token_id,)
        assert draft.positions[1].ids.size == 0
        assert draft.finish is FinishReason.STOP
    backend, _, _ = make((200, chunk("t") + chunk("<|eos|>", text="", reason="stop") + counted(2) + DONE))
    draft = await backend.draft((), 5)
    assert draft.tokens[1:] == (backend.tokenizer.eos_token_id,)
    assert draft.positions[1].ids.size == 2, "vLLM reports it"


async def test_an_end_that_is_not_reported_needs_a_name(make: Replay, tiny_target: Path) -> None:
    tokens = Vocabulary.from_hf(load_tokenizer(tiny_target)).tokens
    endless = Vocabulary.from_bytes(tokens, control={0: Role.OTHER}, name="endless")
    backend, _, _ = make((200, chunk("t") + chunk(reason="stop") + counted(2) + DONE), tokenizer=endless)
    with pytest.raises(TokenizerMismatch, match=r"openai ends its answers .* tokenizer endless names no end-of-turn token") as caught:
        await backend.draft((), 5)
    assert "with its end token" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (chunk("t") + counted(1) + DONE, StreamInterrupted, "before its last event"),
        (chunk("t") + chunk(reason="length") + counted(2) + DONE, MalformedAnswer, "wrote 2 tokens, 1 arrived"),
        (chunk("t", "t") + chunk(reason="stop") + counted(1) + DONE, MalformedAnswer, "wrote 1 tokens, 2 arrived"),
        (chunk("t", text="h"), MalformedAnswer, "where its text says"),
        (chunk(text="hello"), LogprobsUnavailable, "without log-probabilities"),
        (chunk("t", logprobs=None), LogprobsUnavailable, "without log-probabilities"),
        (chunk("t", logprobs={"content": [{"token": "t"}]}), MalformedAnswer, "lack a field"),
        (chunk("t", logprobs={"content": [entry("t", -0.3, top_logprobs=None)]}), MalformedAnswer, "lack a field"),
        (chunk("t", logprobs={"content": [entry("t", -0.3, top_logprobs=[entry("Z", None)])]}), MalformedAnswer, "lack a field"),  # type: ignore[arg-type]
        (chunk("t", logprobs={"content": [entry("t", -2.3, top_logprobs=[entry("Z", -0.3)])]}), MalformedAnswer, "most probable token"),
        (chunk("t", logprobs={"content": [entry("t", 0.3, top_logprobs=[entry("Z", -0.3)])]}), LogprobsUnavailable, "sum to more"),
        (chunk("t") + chunk(reason="content_filter"), RequestRejected, "content_filter"),
        (chunk("t") + chunk(reason="length", delta={"reasoning_content": "hm"}), RequestRejected, "reasons"),
        (
            chunk("t") + chunk(reason="length") + counted(9, completion_tokens_details={"reasoning_tokens": 8}),
            RequestRejected,
            "out of sight",
        ),
        ('data: {"error": {"message": "overloaded"}}\n\n', StreamInterrupted, "overloaded"),
        ("data: {\n\n", MalformedAnswer, "not JSON"),
    ],
)
async def test_chat_answers_that_cannot_be_trusted(make: Replay, answer: str, error: type[Exception], says: str) -> None:
    backend, _, _ = make((200, answer), max_retries=0)
    with pytest.raises(error, match=says):
        await backend.draft((), 5)


async def test_what_was_handed_out_and_is_wrong_is_not_asked_again(make: Replay) -> None:
    """Without numbers in the events a lost one shows at the end alone, when text is out: going on from it would make it stay."""
    backend, _, _ = make((200, chunk("t") + chunk("h") + chunk(reason="stop") + counted(9) + DONE))
    with pytest.raises(MalformedAnswer) as caught:
        _ = [piece async for piece in backend.stream((), 5)]
    assert not caught.value.retryable
    backend, _, _ = make((200, chunk("t") + chunk(reason="length") + counted(9) + DONE))
    with pytest.raises(MalformedAnswer) as caught:
        _ = [piece async for piece in backend.stream((), 1)]
    assert caught.value.retryable, "the last token waits for the count"


def line(*words: str, text: str | None = None, reason: str | None = None, at: int = 3, **report: Any) -> str:
    """One event of a completions stream."""
    offsets = [at + sum(map(len, words[:i])) for i in range(len(words))]
    lists = {"tokens": list(words), "token_logprobs": [-0.3] * len(words), "text_offset": offsets}
    lists |= {"top_logprobs": [{word: -0.3, "Z": -2.0} for word in words]} | report
    said = "".join(words) if text is None else text
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': said, 'logprobs': lists, 'finish_reason': reason}]})}\n\n"


async def test_a_completions_stream_is_read(make: Replay, tiny_target: Path) -> None:
    answer = line("t") + line("h", "e", at=4) + line("bytes:\\xe6", text="", at=6) + line("bytes:\\x9d", "bytes:\\xb1", text="東", at=6)
    backend, bodies, paths = make((200, answer + line(reason="length") + counted(6) + DONE), route="completions")
    prefix = backend.tokenizer.encode("The")
    draft = await backend.draft(prefix, 6)
    assert load_tokenizer(tiny_target).decode(list(draft.tokens)) == "the東"
    assert paths == ["http://server/v1/completions"]
    assert (bodies[0]["prompt"], bodies[0]["logprobs"]) == ("The", 2)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (line("t") + line("t"), MalformedAnswer, "lost or came twice"),
        (line("t") + line("h", at=5), MalformedAnswer, "lost or came twice"),
        (line("t", token_logprobs=[None]), MalformedAnswer, "lack a field"),
        (line("t", top_logprobs=None), LogprobsUnavailable, "without their rivals"),
        (line("t", tokens=["t", "h"]), MalformedAnswer, "belong together"),
        (line("t").replace('"logprobs"', '"other"'), LogprobsUnavailable, "without log-probabilities"),
        (line("t", reason="stop") + counted(5), MalformedAnswer, "wrote 5 tokens"),
    ],
)
async def test_completions_that_cannot_be_trusted(make: Replay, answer: str, error: type[Exception], says: str) -> None:
    backend, _, _ = make((200, answer + DONE), route="completions", max_retries=0)
    with pytest.raises(error, match=says):
        await backend.draft(backend.tokenizer.encode("The"), 9)


async def test_an_end_that_was_reported_before_must_be_reported_again(make: Replay, tiny_target: Path) -> None:
    name = str(load_tokenizer(tiny_target).eos_token)
    told, untold = (line("t") + line(*end, text="", at=4, reason="stop") + counted(2) + DONE for end in ([name], []))
    backend, _, _ = make((200, untold), (200, told), (200, untold), route="completions", max_retries=0)
    prefix = backend.tokenizer.encode("The")
    end = backend.tokenizer.eos_token_id
    for reported in (False, True):
        draft = await backend.draft(prefix, 9)
        assert (draft.tokens[-1], draft.finish) == (end, "stop")
        assert bool(draft.positions[-1].ids.size) is reported
    with pytest.raises(MalformedAnswer, match="without reporting the end token, as it did before"):
        await backend.draft(prefix, 9)


@pytest.mark.parametrize(
    ("base_url", "asked"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1/chat/completions"),
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/", "http://localhost:8000/v1/chat/completions"),
        ("https://host/api/v1", "https://host/api/v1/chat/completions"),
        ("https://host/v1beta/openai/", "https://host/v1beta/openai/chat/completions"),
        ("https://host/beta", "https://host/beta/chat/completions"),
    ],
)
async def test_base_urls_are_the_official_clients(make: Replay, base_url: str, asked: str) -> None:
    backend, _, paths = make((200, chunk("t") + chunk(reason="length") + counted(1)), base_url=base_url)
    await backend.draft((), 1)
    assert paths == [asked]


async def test_the_conversation_comes_before_any_request(make: Replay) -> None:
    backend, _, paths = make((200, ""))
    with pytest.raises(UsageError, match="route='completions'"):
        await backend.answering(()).draft((), 1)
    assert paths == []


def test_an_unknown_route_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean 'completions'"):
        create_backend("openai", base_url="http://server", route="completion")


# --- the first look at a server


def backend_of(server: EmulatorServer, tokenizer: Any, *, route: str = "chat", **options: Any) -> Any:
    return create_backend("openai", base_url=server.url, tokenizer=tokenizer, route=route, **options)


@pytest.mark.parametrize("prefill", ["none", "plain", "continue_final_message", "prefix"])
async def test_how_a_server_continues_is_found_out(engine: Engine, tiny_target: Path, prefill: str) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", prefill=prefill)) as server:
        backend = backend_of(server, str(tiny_target))
        found = await backend.probe()
        assert found.continues == (prefill != "none")
        assert (found.model, found.top_logprobs, found.top_logprobs_cap, found.processed) == (MODEL, 20, None, False)
        assert found.sampling == {"temperature", "top_p"}
        assert ("cannot continue an answer" if prefill == "none" else f"({prefill})") in found.notes[0]
        about = backend.answering(QUESTION)
        whole = await about.draft((), 12)
        cut = next(i for i in range(6, 0, -1) if about.resume(whole.tokens[:i]) == whole.tokens[:i] or prefill == "none")
        assert (about.resume(whole.tokens[:cut]) is None) == (prefill == "none")
        rest = await about.draft(whole.tokens[:cut], 12 - cut)
        assert rest.tokens == whole.tokens[cut:], "gone on with, or written again and compared"
        for ours, theirs in zip(rest.positions, whole.positions[cut:], strict=True):
            np.testing.assert_array_equal(ours.ids, theirs.ids)
        await backend.aclose()


async def test_a_server_that_cannot_continue_repeats_greedy_text_only(engine: Engine, tiny_target: Path) -> None:
    with EmulatorServer(build_app(engine, dialect="openai")) as server:
        backend = backend_of(server, str(tiny_target))
        await backend.probe()
        about = backend.answering(QUESTION)
        whole = await about.draft((), 4)
        with pytest.raises(MalformedAnswer, match="did not repeat"):
            await about.draft([whole.tokens[0], 5], 1)
        with pytest.raises(ContinuationUnavailable, match="sampled answer broke off"):
            await about.draft(whole.tokens[:2], 1, ServerSampling(1.0))
        score = await about.score((), whole.tokens[:3])
        assert np.isfinite(score.logprobs).all()
        with pytest.raises(ContinuationUnavailable, match="score"):
            await about.score((), [5, 6])
        await backend.aclose()


STRIPPED = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] | trim }}"
    "{{ '<|eos|>' if m['role'] == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


async def test_white_space_at_the_ends_is_sent_only_where_it_arrives(engine: Engine, tiny_target: Path) -> None:
    texts = (" The", "The ", "The")
    with EmulatorServer(build_app(engine, dialect="openai", prefill="plain")) as server:
        backend = backend_of(server, str(tiny_target))
        await backend.probe()
        ids = [backend.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert [backend.resume(i) for i in ids] == ids
        await backend.aclose()
    trimming = load_tokenizer(tiny_target)
    trimming.chat_template = STRIPPED
    other = Engine(engine.model, trimming, name=MODEL)
    with EmulatorServer(build_app(other, dialect="openai", prefill="plain")) as server:
        backend = backend_of(server, str(tiny_target))
        assert (await backend.probe()).continues
        assert [backend.resume(i) for i in ids] == [None, None, ids[2]]
        await backend.aclose()


@pytest.mark.parametrize(("token_prompts", "route"), [(True, "ids"), (False, "text")])
async def test_completions_go_by_ids_where_they_can(engine: Engine, tiny_target: Path, token_prompts: bool, route: str) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", token_prompts=token_prompts)) as server:
        backend = backend_of(server, str(tiny_target), route="completions")
        found = await backend.probe()
        assert (found.ids_in, found.top_logprobs, found.top_logprobs_cap, found.continues) == (route == "ids", 5, 5, True)
        pieces = [t for c in " moons" for t in backend.tokenizer.encode(c, add_special_tokens=False)]
        prefix = [*backend.tokenizer.encode("The", add_special_tokens=False), *pieces]
        assert (backend.resume(prefix) == prefix) == (route == "ids"), "text has a split of its own"
        await backend.aclose()


async def test_a_first_token_that_the_server_adds_is_counted_once(tmp_path: Path) -> None:
    import tiny

    folder = tiny.tiny_model(tmp_path / "bos", bos=True)
    with EmulatorServer(build_app(folder, dialect="openai", token_prompts=False)) as server:
        backend = backend_of(server, str(folder), route="completions")
        await backend.probe()
        ids = backend.tokenizer.encode("The sea")
        assert ids[0] == backend.tokenizer.bos_token_id
        exact = engine_rows(Engine.load(folder), ids)
        draft = await backend.draft(ids, 1)
        assert draft.positions[0].logprobs[0] == pytest.approx(exact.max(), abs=1e-4)
        await backend.aclose()


def engine_rows(engine: Engine, ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return engine.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()


@pytest.mark.parametrize(("route", "cap"), [("chat", 3), ("completions", 3), ("completions", 5)])
async def test_a_lower_cap_is_said_only_where_more_was_asked_for(engine: Engine, tiny_target: Path, route: str, cap: int) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", max_logprobs=cap)) as server:
        backend = backend_of(server, str(tiny_target), route=route, top_logprobs=20)
        with pytest.warns(CapabilityWarning, match=f"top {cap}"):
            assert (await backend.probe()).top_logprobs == cap
        await backend.aclose()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backend = backend_of(server, str(tiny_target), route=route)
            assert (await backend.probe()).top_logprobs_cap == cap
            await backend.aclose()


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_server_without_log_probabilities_raises(engine: Engine, tiny_target: Path, route: str) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", logprobs=False)) as server:
        backend = backend_of(server, str(tiny_target), route=route)
        with pytest.raises(LogprobsUnavailable, match="choose a model"):
            await backend.probe()
        await backend.aclose()


async def test_a_first_token_that_ends_the_answer_is_drawn_again(make: Replay) -> None:
    def answer(reason: str, *words: str) -> tuple[int, str]:
        content = [entry(word, -0.3, top_logprobs=[entry(word, -0.3), entry("Z", -2.0)]) for word in words]
        choice = {"message": {"content": "".join(words)}, "logprobs": {"content": content}, "finish_reason": reason}
        return 200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7}})

    ended = answer("stop")
    backend, bodies, _ = make(ended, ended, answer("length", "A"))
    top, counted_ = await backend._once({}, temperature=2.0)
    assert (len(bodies), top.ids.size, counted_) == (3, 2, 7)
    for temperature, asked in ((0.0, 1), (2.0, DRAWS)):
        backend, bodies, _ = make(ended)
        with pytest.raises(LogprobsUnavailable):
            await backend._once({}, temperature=temperature)
        assert len(bodies) == asked, "the same again, or ended each time"
    backend, bodies, _ = make(answer("length"))
    with pytest.raises(LogprobsUnavailable):
        await backend._once({}, temperature=2.0)
    assert len(bodies) == 1, "nothing is reported of a token that does not end the answer"


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_another_tokenizer_is_seen_by_its_counts(engine: Engine, tmp_path: Path, route: str) -> None:
    import tiny

    tiny.tiny_tokenizer(tmp_path / "other", vocab_size=300)
    with EmulatorServer(build_app(engine, dialect="openai")) as server:
        backend = backend_of(server, str(tmp_path / "other"), route=route)
        with pytest.raises(TokenizerMismatch, match="tokenizer="):
            await backend.probe()
        await backend.aclose()


async def test_a_key_and_a_model_that_are_not_right(engine: Engine, tiny_target: Path) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", api_key="right")) as server:
        backend = backend_of(server, str(tiny_target), api_key="wrong")
        with pytest.raises(AuthenticationFailed, match="api_key"):
            await backend.probe()
        await backend.aclose()
        backend = backend_of(server, str(tiny_target), api_key="right", model="other")
        with pytest.raises(ModelNotFound, match="other"):
            await backend.probe()
        await backend.aclose()


async def test_one_of_many_models_must_be_named(make: Replay) -> None:
    listing = json.dumps({"data": [{"id": f"m{i}"} for i in range(40)]})
    backend, _, _ = make((200, listing), model=None)
    with pytest.raises(UsageError, match=r"serves 40 models\n  fix: name one: model=\.\.\. \(--model\), of m0, m1, .*, \.\.\."):
        await backend.probe()


async def test_a_length_that_newer_models_want_under_another_name(make: Replay) -> None:
    told = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    refused = json.dumps({"error": {"message": told, "type": "invalid_request_error", "param": "max_tokens", "code": None}})
    whole = {"message": {"content": "t"}, "finish_reason": "length"}
    whole |= {"logprobs": {"content": [entry("t", -0.3, top_logprobs=[entry("t", -0.3), entry("Z", -2.0)])]}}
    answer = json.dumps({"choices": [whole], "usage": {"prompt_tokens": 3}})
    backend, bodies, _ = make((400, refused), (200, answer))
    top, count = await backend._once({"messages": QUESTION})
    assert (top.ids.size, count) == (2, 3)
    assert [set(body) & {"max_tokens", "max_completion_tokens"} for body in bodies] == [{"max_tokens"}, {"max_completion_tokens"}]


async def test_a_model_that_gives_no_log_probabilities_says_so(make: Replay) -> None:
    told = "You are not allowed to request logprobs from this model"
    refused = json.dumps({"error": {"message": told, "type": "invalid_request_error", "param": None, "code": None}})
    backend, _, _ = make((403, refused))
    with pytest.raises(AuthenticationFailed, match="not allowed to request logprobs"):
        await backend._once({"messages": QUESTION})
    backend, _, _ = make((400, refused))
    with pytest.raises(LogprobsUnavailable, match="not allowed to request logprobs"):
        await backend._once({"messages": QUESTION})


async def test_half_characters_without_bytes_are_asked_for_with_what_completes_them(engine: Engine, tiny_target: Path) -> None:
    """Whatever number of tokens is asked for, the answer's tokens are those that were written."""
    tokenizer = load_tokenizer(tiny_target)
    written = [*tokenizer.encode("a 東 moon", add_special_tokens=False), tokenizer.eos_token_id]
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    with scripted(engine, *written, prompt=len(prompt), dialect="openai", model_id=MODEL, token_bytes=False) as server:
        about = backend_of(server, tokenizer, model=MODEL, top_logprobs=3).answering(QUESTION)
        for n in range(1, len(written)):
            draft = await about.draft((), n)
            assert list(draft.tokens) == written[:n]
            assert [int(top.ids[0]) for top in draft.positions] == written[:n]
        await about.aclose()
    with scripted(engine, *written, prompt=len(prompt), dialect="openai", model_id=MODEL, token_bytes=False) as server:
        backend = backend_of(server, tokenizer, model=MODEL, top_logprobs=3, route="completions")
        backend._takes_ids = True
        for n in range(1, len(written) + 1):
            assert list((await backend.draft(prompt, n)).tokens) == written[:n]
        await backend.aclose()
