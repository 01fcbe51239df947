"""Backends against real servers' recorded answers, and the parts that no emulator can show."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from uld_adapters import http
from uld_adapters.errors import (
    ContextExceeded,
    LogprobsUnavailable,
    MalformedAnswer,
    ModelNotFound,
    RequestRejected,
    ServerBusy,
    StreamInterrupted,
    TokenizerMismatch,
    UsageError,
)
from uld_adapters.logprobs import FinishReason
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer, tokenizer_fingerprint
from uld_adapters.vocabulary.words import ends_inside_character

RECORDED = Path(os.environ.get("ULD_SHARED", Path(__file__).parents[3] / "shared")) / "servers" / "recorded"
needs_recordings = pytest.mark.skipif(not RECORDED.is_dir(), reason="needs the recorded answers (ULD_SHARED)")
PREFIX = [0, 1534, 1313, 1458]
WRITTEN = (1216, 1732, 624, 1414)


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def replay(*answers: tuple[int, str]) -> tuple[httpx2.AsyncClient, list[dict[str, Any]]]:
    """A client whose server gives these answers in turn (the last again and again), and the bodies it was sent."""
    bodies: list[dict[str, Any]] = []
    left = list(answers)

    def handle(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content) if request.content else {})
        status, text = left.pop(0) if len(left) > 1 else left[0]
        return httpx2.Response(status, text=text)

    return httpx2.AsyncClient(transport=httpx2.MockTransport(handle)), bodies


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)


@pytest.fixture
async def make(tiny_target: Path) -> AsyncIterator[Any]:
    clients = []

    def build(name: str, *answers: tuple[int, str], top: int = 3, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
        client, bodies = replay(*answers)
        clients.append(client)
        options = {"base_url": "http://server", "tokenizer": str(tiny_target), "http_client": client, "top_logprobs": top} | options
        return create_backend(name, **options), bodies

    yield build
    for client in clients:
        await client.aclose()


@needs_recordings
async def test_vllms_recorded_stream(make: Any) -> None:
    backend, bodies = make("vllm", (200, recorded("vllm_completions_stream")["body_text"]), model="tiny")
    draft = await backend.draft(PREFIX, 4)
    assert draft.tokens == WRITTEN
    assert draft.finish is FinishReason.LENGTH
    assert draft.positions[0].ids.tolist() == [1216, 712, 1400]
    assert draft.positions[0].logprobs[0] == pytest.approx(-0.529881477)
    assert bodies[0]["return_tokens_as_token_ids"]
    assert bodies[0]["prompt"] == PREFIX
    assert "logprob_token_ids" not in bodies[0], "it corrupts other requests' answers"


@needs_recordings
async def test_llamacpps_recorded_stream(make: Any) -> None:
    backend, bodies = make("llamacpp", (200, recorded("llamacpp_completion_stream")["body_text"]), top=5)
    draft = await backend.draft(PREFIX, 4)
    assert draft.tokens == WRITTEN
    assert draft.positions[2].of(1045) == pytest.approx(-3.043804883)
    assert bodies[0]["temperature"] == 0.0


@needs_recordings
async def test_vllms_recorded_prompt_logprobs(make: Any) -> None:
    backend, _ = make("vllm", (200, json.dumps(recorded("vllm_prompt_logprobs")["response"])), top=2, model="tiny")
    score = await backend.score(PREFIX[:1], PREFIX[1:])
    np.testing.assert_allclose(score.logprobs, [-10.61034107, -9.271327018, -10.613706588], atol=1e-6)


@needs_recordings
@pytest.mark.parametrize(
    ("name", "recording", "error"),
    [("llamacpp", "llamacpp_err_ctx", ContextExceeded), ("vllm", "vllm_err_oov", RequestRejected)],
)
async def test_recorded_refusals(make: Any, name: str, recording: str, error: type[Exception]) -> None:
    answer = recorded(recording)
    backend, bodies = make(name, (answer["status"], json.dumps(answer["response"])), model="tiny")
    with pytest.raises(error):
        await backend.draft(PREFIX, 4)
    assert len(bodies) == 1, "a 4xx is not tried again"


def tgi_events(*tokens: int, first: int = 1, **last: Any) -> str:
    lines = []
    for number, token in enumerate(tokens):
        entry = {"id": token, "text": "x", "logprob": -0.3, "special": False}
        others = [{"id": i, "text": "y", "logprob": value, "special": False} for i, value in ((201, -2.0), (202, -3.0))]
        event: dict[str, Any] = {"index": first + number, "token": entry, "top_tokens": [entry, *others], "details": None}
        if number == len(tokens) - 1:
            event["details"] = {"finish_reason": "length", "generated_tokens": len(tokens), "input_length": 1} | last
        lines.append(f"data:{json.dumps(event)}\n\n")
    return "".join(lines)


async def test_tgi_reads_its_stream(make: Any) -> None:
    backend, bodies = make("tgi", (200, tgi_events(300, 301)))
    draft = await backend.draft([289], 2)
    assert draft.tokens == (300, 301)
    assert bodies[0]["parameters"]["do_sample"] is False
    assert "temperature" not in bodies[0]["parameters"], "TGI refuses a temperature of 0"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (tgi_events(300, 301, first=2), MalformedAnswer),
        (tgi_events(300, 301).replace('"index": 2', '"index": 1'), MalformedAnswer),
        (tgi_events(300, 301, generated_tokens=3), MalformedAnswer),
        (tgi_events(300, 301, input_length=7), TokenizerMismatch),
        (tgi_events(300, 301).replace('"details": {', '"other": {'), StreamInterrupted),
        (tgi_events(300).replace('"top_tokens"', '"other"'), LogprobsUnavailable),
        (tgi_events(300).replace("-0.3", "null"), MalformedAnswer),
        (tgi_events(300).replace("-2.0", "null"), MalformedAnswer),
        (tgi_events(300).replace("-0.3", "-8.5"), MalformedAnswer),
        ('data:{"error":"Request failed during generation","error_type":"generation"}\n\n', StreamInterrupted),
        ('data:{"error":"Model is overloaded","error_type":"overloaded"}\n\n', ServerBusy),
    ],
)
async def test_tgi_answers_that_cannot_be_trusted(make: Any, answer: str, error: type[Exception]) -> None:
    backend, _ = make("tgi", (200, answer), max_retries=0)
    with pytest.raises(error):
        await backend.draft([289], 2)


async def test_a_retry_after_a_busy_answer(make: Any) -> None:
    backend, bodies = make("tgi", (503, "busy"), (429, "later"), (200, tgi_events(300)))
    assert (await backend.draft([289], 1)).tokens == (300,)
    assert len(bodies) == 3


async def test_retries_end(make: Any) -> None:
    backend, bodies = make("tgi", (500, "no"), max_retries=2)
    with pytest.raises(ServerBusy):
        await backend.draft([289], 1)
    assert len(bodies) == 3


async def test_a_page_that_is_not_there(make: Any) -> None:
    backend, bodies = make("llamacpp", (404, '{"error": "nothing here"}'))
    with pytest.raises(ModelNotFound, match="nothing here") as caught:
        await backend.draft([289], 1)
    assert len(bodies) == 1
    assert caught.value.hint == "check --backend and --base-url (with openai --route, too)"


def test_retry_after_is_honoured() -> None:
    headers = httpx2.Headers({"retry-after": "7"})
    assert http.seconds_before_retry(1, http.error_for(429, b"", headers, "u")) == 7.0
    date = httpx2.Headers({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"})
    assert http.seconds_before_retry(1, http.error_for(503, b"", date, "u")) == http.LONGEST_WAIT


async def test_tgi_cuts_back_to_where_both_splits_agree(make: Any) -> None:
    """A prefix that the server would split otherwise goes out shorter, and its own tokens must come again."""
    backend, bodies = make("tgi", (200, "data:{}\n\n"))
    tokenizer = backend.tokenizer
    whole = tokenizer.encode(" moons", add_special_tokens=False)
    parts = [t for c in " moons" for t in tokenizer.encode(c, add_special_tokens=False)]
    assert whole != parts
    prefix = [*tokenizer.encode("The", add_special_tokens=False), *parts]
    start, text = backend._sendable(prefix)
    assert tokenizer.encode(text, add_special_tokens=False) == prefix[:start]
    assert start < len(prefix)
    again = tgi_events(*prefix[start:], 300, input_length=start)
    backend, bodies = make("tgi", (200, again))
    assert (await backend.draft(prefix, 1)).tokens == (300,)
    assert bodies[0]["inputs"] == text
    assert bodies[0]["parameters"]["max_new_tokens"] == 1 + len(prefix) - start
    backend, _ = make("tgi", (200, tgi_events(*([299] * (len(prefix) - start)), 300, input_length=start)), max_retries=0)
    with pytest.raises(MalformedAnswer, match="repeat"):
        await backend.draft(prefix, 1)
    assert list(backend.resume(prefix)) == [*tokenizer.encode("The", add_special_tokens=False), *whole]


async def test_tgi_counts_bos_once(tmp_path: Path) -> None:
    import tiny
    from uld_adapters.emulator import EmulatorServer, build_app

    folder = tiny.tiny_model(tmp_path / "bos", bos=True)
    with EmulatorServer(build_app(folder, dialect="tgi", max_top_n_tokens=5)) as server:
        backend = create_backend("tgi", base_url=server.url, tokenizer=str(folder), top_logprobs=5)
        await backend.probe()
        ids = backend.tokenizer.encode("The sea")
        assert ids[0] == backend.tokenizer.bos_token_id
        assert len((await backend.draft(ids, 3)).tokens) == 3, "input_length is checked against the prefix"
        await backend.aclose()


@pytest.mark.parametrize(
    ("data", "inside"),
    [(b"", False), (b"a", False), ("é".encode(), False), ("é".encode()[:1], True), ("😀".encode()[:3], True), ("a😀".encode(), False)],
)
def test_unfinished_characters_are_seen(data: bytes, inside: bool) -> None:
    assert ends_inside_character(data) is inside


def test_the_fingerprint_knows_tokenizers_apart(tiny_target: Path, tmp_path: Path) -> None:
    import tiny

    first = load_tokenizer(str(tiny_target))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(load_tokenizer(tiny_target))
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(tiny.tiny_tokenizer(tmp_path, vocab_size=390))
    vocabulary = Vocabulary.from_hf(first)
    text = "Café 東京 😀"
    assert b"".join(vocabulary.tokens[i] for i in first.encode(text, add_special_tokens=False)) == text.encode()


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMismatch, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_backend_without_tokenizer() -> None:
    with pytest.raises(UsageError, match="tokenizer="):
        _ = create_backend("vllm", base_url="http://server").tokenizer


def biased(index: int, written: int, *tops: tuple[int, float], value: float = -1.0) -> dict[str, Any]:
    """llama.cpp's answer of one token under a bias."""
    top = [{"id": token, "token": "x", "bytes": [120], "logprob": logprob} for token, logprob in tops]
    return {"index": index, "completion_probabilities": [{"id": written, "logprob": value, "top_logprobs": top}]}


TOPS = ((300, -0.5), (301, -1.5), (302, -2.5))


async def test_llamacpp_scores_many_positions_a_request(make: Any) -> None:
    chunk = [biased(step, 99, *TOPS) for step in range(3)]
    answers = ({"total_slots": 2}, chunk, biased(0, 310, *TOPS, value=-7.0))
    backend, bodies = make("llamacpp", *((200, json.dumps(answer)) for answer in answers))
    score = await backend.score([5, 6], [301, 310, 300])
    np.testing.assert_allclose(score.logprobs, [-1.5, -7.0, -0.5])
    assert [top.ids.tolist() for top in score.positions] == [[300, 301, 302]] * 3
    assert bodies[1]["prompt"] == [[5, 6], [5, 6, 301], [5, 6, 301, 310]]
    assert (bodies[1]["n_predict"], bodies[1]["id_slot"], bodies[2]["id_slot"]) == (1, 0, 0)
    assert (bodies[2]["prompt"], bodies[2]["logit_bias"]) == ([5, 6, 301], [[310, 1000.0]])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([biased(0, 99, *TOPS)], "answered 1 of 2 prompts"),
        ([biased(1, 99, *TOPS), biased(0, 99, *TOPS)], "in another order"),
        ([biased(0, 99, *TOPS), biased(1, 99, *TOPS[:2])], "reported 2 of 3 log-probabilities"),
    ],
)
async def test_llamacpps_chunk_is_checked(make: Any, answer: Any, message: str) -> None:
    backend, _ = make("llamacpp", (200, '{"total_slots": 1}'), (200, json.dumps(answer)), max_retries=0)
    with pytest.raises(MalformedAnswer, match=message):
        await backend.score([5], [300, 301])


async def test_llamacpp_must_write_the_token_that_it_is_made_to_write(make: Any) -> None:
    answers = ({"total_slots": 1}, biased(0, 99, *TOPS), biased(0, 99, *TOPS))
    backend, _ = make("llamacpp", *((200, json.dumps(answer)) for answer in answers), max_retries=0)
    with pytest.raises(MalformedAnswer, match="wrote token 99 under a bias towards 310"):
        await backend.score([5], [310])


async def test_llamacpp_leaves_open_what_it_will_not_say(make: Any) -> None:
    answers = ({"total_slots": 1}, biased(0, 99, *TOPS), {"index": 0, "completion_probabilities": []})
    backend, _ = make("llamacpp", *((200, json.dumps(answer)) for answer in answers))
    score = await backend.score([5], [310])
    assert np.isnan(score.logprobs).all()
    assert score.positions[0].ids.tolist() == [300, 301, 302]


@pytest.mark.parametrize("name", ["tgi", "llamacpp"])
async def test_a_served_text_is_scored_like_a_local_one(name: str, request: pytest.FixtureRequest, tiny_target: Path) -> None:
    served = create_backend(name, base_url=request.getfixturevalue(f"{name}_server").url, tokenizer=str(tiny_target), top_logprobs=8)
    local = create_backend("hf", model=str(tiny_target), top_logprobs=8)
    prefix = served.tokenizer.encode("<|user|>What is the name of the river?<|assistant|>", add_special_tokens=False)
    texts = ("It is called the Amber.", "naïve smile 😀 and snow ☃", "counts 1234567890 apples " * 4)
    rows = [[*served.tokenizer.encode(text, add_special_tokens=False), served.tokenizer.eos_token_id] for text in texts]
    await served.probe()
    for row in rows[:1] if name == "tgi" else rows:
        found, expected = await served.score(prefix, row), await local.score(prefix, row)
        np.testing.assert_array_equal([top.ids for top in found.positions], [top.ids for top in expected.positions])
        told = ~np.isnan(found.logprobs)
        np.testing.assert_allclose(found.logprobs[told], expected.logprobs[told], atol=1e-3)
        for token, top, other, value in zip(row, found.positions, expected.positions, found.logprobs, strict=True):
            np.testing.assert_allclose(top.logprobs, other.logprobs, atol=1e-3)
            if np.isnan(value):
                assert top.of(token) is None
                assert name == "tgi" or ends_inside_character(Vocabulary.from_hf(served.tokenizer).tokens[token])
    await served.aclose()


async def test_a_draft_that_leaves_the_text_is_cancelled(tiny_target: Path) -> None:
    from uld_adapters.emulator import EmulatorServer, build_app

    app = build_app(tiny_target, dialect="tgi", max_top_n_tokens=5, seconds_per_token=0.02)
    with EmulatorServer(app) as server:
        backend = create_backend("tgi", base_url=server.url, tokenizer=str(tiny_target))
        await backend.probe()
        before = app.state.stats.cancelled
        ids = backend.tokenizer.encode("The planet has two moons.", add_special_tokens=False)
        score = await backend.score(ids[:2], ids[2:])
        assert len(score.positions) == len(ids) - 2
        assert app.state.stats.cancelled > before
        await backend.aclose()
