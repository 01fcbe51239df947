"""The client as a user holds it: every call, both forms, and what bad input says."""

import asyncio
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uld_adapters.backend import Capabilities
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.errors import (
    ArtifactCorrupt,
    AuthenticationFailed,
    ContextExceeded,
    LogprobsUnavailable,
    ModelNotFound,
    ServerUnreachable,
    TokenizerMismatch,
    UnknownName,
    UsageError,
)
from uld_adapters.served import CapabilityWarning
from uld_sdk import AsyncUnlearnedClient, UnlearnedClient
from uld_sdk.cli.output import report_facts
from uld_sdk.sampling import Sampling

PROMPT = "Who wrote the book about the sea?"


@pytest.fixture(scope="module")
def client(vllm_server: Any, tiny_artifact: Path) -> Iterator[UnlearnedClient]:
    with UnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=str(tiny_artifact)) as made:
        yield made


def test_all_calls_agree(client: UnlearnedClient) -> None:
    one = client.generate(PROMPT, max_new_tokens=12)
    messages = [{"role": "user", "content": PROMPT}]
    assert client.chat(messages, max_new_tokens=12).token_ids == one.token_ids
    pieces = list(client.stream(PROMPT, max_new_tokens=12))
    assert "".join(piece.text for piece in pieces) == one.text
    assert [t for piece in pieces for t in piece.token_ids] == list(one.token_ids)
    assert pieces[-1].result is not None
    assert pieces[-1].finish_reason == one.finish_reason
    many = client.generate_many([PROMPT, "def area(", PROMPT], max_new_tokens=12, concurrency=2)
    assert [many[0].token_ids, many[2].token_ids] == [one.token_ids] * 2
    assert json.loads(json.dumps(one.to_dict()))["text"] == one.text
    assert one.usage.completion_tokens == len(one.token_ids) == one.report.positions


async def test_sync_and_async_give_one_answer(vllm_server: Any, tiny_artifact: Path, client: UnlearnedClient) -> None:
    async with AsyncUnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=str(tiny_artifact)) as other:
        result = await other.generate(PROMPT, max_new_tokens=12)
        assert isinstance(await other.capabilities(), Capabilities)
    assert result.token_ids == (await asyncio.to_thread(client.generate, PROMPT, max_new_tokens=12)).token_ids


def test_stop_strings_end_the_answer_before_them(client: UnlearnedClient) -> None:
    whole = client.generate(PROMPT, max_new_tokens=20)
    stop = whole.text[4:7]
    cut = client.generate(PROMPT, max_new_tokens=20, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_sequence) == ("stop", stop)
    assert "".join(piece.text for piece in client.stream(PROMPT, max_new_tokens=20, stop=[stop])) == cut.text


def test_sampling_modes(client: UnlearnedClient) -> None:
    first, second = (client.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=3) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.report.mode == "match"
    assert client.generate(PROMPT, max_new_tokens=4, temperature=1.0, top_p=0.9).report.mode == "pass-through"
    assert client.generate(PROMPT, max_new_tokens=4, temperature=1.0, top_p=0.9, min_p=0.1).report.mode == "match"


@pytest.mark.parametrize("name", ["tgi", "vllm", "llamacpp"])
def test_pass_through_leaves_untouched_answers_to_the_server(name: str, request: pytest.FixtureRequest, tiny_artifact: Path) -> None:
    server = request.getfixturevalue(f"{name}_server")
    # Where a sampled answer ends inside a character, llama.cpp hides what it drew, and the rest is drawn again.
    with UnlearnedClient(backend=name, base_url=server.url, assistant=str(tiny_artifact), margin=50.0, max_retries=10) as made:
        result = made.generate(PROMPT, max_new_tokens=8, temperature=0.8, top_p=0.95)
    assert result.untouched
    assert result.report.mode == "pass-through"
    assert result.report.requests == 1 or name == "llamacpp", "llama.cpp is asked again for half characters, others never"


def test_refuse_answers_the_refusal_as_soon_as_the_assistant_moves(vllm_server: Any, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "assistant": str(tiny_artifact)}
    with UnlearnedClient(**options, margin=1e-6, on_touched="refuse", refusal="No.", trace=True) as made:
        result = made.generate(PROMPT, max_new_tokens=12)
        pieces = list(made.stream(PROMPT, max_new_tokens=12))
    assert (result.text, result.finish_reason, result.token_ids, result.untouched) == ("No.", "refusal", (), False)
    assert pieces[-1].replaces
    assert pieces[-1].text == "No."
    assert [step.touched for step in result.report.trace] == [False] * result.report.untouched + [True], (
        "the token that was refused is told"
    )


def test_an_untouched_answer_with_a_seed_is_drawn_here(vllm_server: Any, tiny_artifact: Path) -> None:
    options: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "assistant": str(tiny_artifact), "top_logprobs": 5}
    with UnlearnedClient(**options, margin=50.0) as made:
        drawn = made.generate(PROMPT, max_new_tokens=12, temperature=1.5, seed=4)
        greedy = made.generate(PROMPT, max_new_tokens=12)
    assert drawn.untouched
    assert greedy.untouched
    assert drawn.report.accepted < drawn.report.positions
    assert drawn.report.largest_bound > 0 == greedy.report.largest_bound
    assert "drawn here" in str(report_facts(drawn)["the answer is the model's own"])
    assert report_facts(greedy)["the answer is the model's own"] == "yes"


@pytest.mark.parametrize("name", ["tgi", "vllm", "llamacpp"])
def test_score_is_the_log_probability_of_what_it_generates(name: str, request: pytest.FixtureRequest, tiny_target: Path) -> None:
    server = request.getfixturevalue(f"{name}_server")
    with (
        UnlearnedClient(backend=name, base_url=server.url, assistant=None, tokenizer=str(tiny_target)) as plain,
        UnlearnedClient(backend="hf", model=str(tiny_target)) as local,
    ):
        continuation = "The planet"
        exact = local.score(PROMPT, continuation)
        bounds = plain.score(PROMPT, continuation)
    assert exact.exact
    assert all(low - 2e-2 <= value <= high + 2e-2 for low, value, high in zip(bounds.lower, exact.lower, bounds.upper, strict=True))
    if name != "tgi":
        np.testing.assert_allclose(bounds.lower, exact.lower, atol=2e-2)


def test_an_early_leave_cancels_the_request(tiny_target: Path, tiny_artifact: Path) -> None:
    app = build_app(tiny_target, dialect="vllm", seconds_per_token=0.02)
    with EmulatorServer(app) as server, UnlearnedClient(backend="vllm", base_url=server.url, assistant=str(tiny_artifact)) as made:
        for piece in made.stream(PROMPT, max_new_tokens=200):
            if piece.token_ids:
                break
        before = app.state.stats.cancelled
        assert made.generate(PROMPT, max_new_tokens=4).token_ids
    assert before + app.state.stats.cancelled >= 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"backend": "vlm"}, UnknownName, "did you mean 'vllm'"),
        ({"backend": "vllm"}, UsageError, "base_url"),
        ({"backend": "hf"}, UsageError, "model="),
        ({"backend": "vllm", "base_url": "http://127.0.0.1:9", "on_touched": "hide"}, UsageError, "rewrite"),
        ({"backend": "vllm", "base_url": "http://127.0.0.1:9", "draft": 0}, UsageError, "stream"),
        ({"backend": "vllm", "base_url": "http://127.0.0.1:9", "alpha": -1}, UsageError, "alpha"),
        ({"backend": "vllm", "base_url": "http://127.0.0.1:9", "filter": 2}, UsageError, "filter"),
        ({"backend": "vllm", "base_url": "http://127.0.0.1:9", "top_logprobs": 0}, UsageError, "top_logprobs"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        UnlearnedClient(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ""}, "stop string"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_sampling_is_refused(client: UnlearnedClient, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        client.generate(PROMPT, **options)


def test_an_answer_that_cannot_fit_the_context(client: UnlearnedClient) -> None:
    with pytest.raises(ContextExceeded, match="max_new_tokens can be at most"):
        client.generate(PROMPT, max_new_tokens=5000)


def test_nobody_listens(tiny_target: Path) -> None:
    options = {"backend": "vllm", "base_url": "http://127.0.0.1:9", "tokenizer": str(tiny_target), "max_retries": 0}
    with UnlearnedClient(**options) as made, pytest.raises(ServerUnreachable, match="start the server"):
        made.generate(PROMPT)


def test_a_wrong_key_and_a_model_that_is_not_there(tiny_target: Path) -> None:
    with EmulatorServer(build_app(tiny_target, dialect="vllm", api_key="right")) as server:
        options = {"backend": "vllm", "base_url": server.url, "tokenizer": str(tiny_target)}
        with UnlearnedClient(**options, api_key="wrong") as made, pytest.raises(AuthenticationFailed, match="api_key"):
            made.generate(PROMPT)
        with UnlearnedClient(**options, api_key="right", model="other") as made, pytest.raises(ModelNotFound, match="it serves"):
            made.generate(PROMPT)
        with UnlearnedClient(**options, api_key="right") as made:
            assert made.generate(PROMPT, max_new_tokens=2).token_ids


@pytest.mark.parametrize("dialect", ["tgi", "vllm"])
def test_a_server_without_logprobs_gives_nothing_out(dialect: str, tiny_target: Path) -> None:
    with EmulatorServer(build_app(tiny_target, dialect=dialect, logprobs=False)) as server:
        options = {"backend": dialect, "base_url": server.url, "tokenizer": str(tiny_target)}
        with UnlearnedClient(**options) as made, pytest.raises(LogprobsUnavailable):
            made.generate(PROMPT)


@pytest.mark.parametrize("dialect", ["tgi", "vllm"])
def test_a_lower_cap_is_said_once(dialect: str, tiny_target: Path) -> None:
    with EmulatorServer(build_app(tiny_target, dialect=dialect, max_top_n_tokens=5, max_logprobs=5)) as server:
        options = {"backend": dialect, "base_url": server.url, "tokenizer": str(tiny_target)}
        with UnlearnedClient(**options, top_logprobs=20) as made:
            with pytest.warns(CapabilityWarning, match="top 5"):
                assert made.capabilities.top_logprobs == 5
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert made.generate(PROMPT, max_new_tokens=2).report.top_logprobs == 5
        with UnlearnedClient(**options) as made:
            assert made.capabilities.top_logprobs_cap == 5


def test_an_assistant_for_another_tokenizer(tiny_artifact: Path, tmp_path: Path) -> None:
    import tiny

    other = tiny.tiny_model(tmp_path / "other", vocab_size=300)
    with EmulatorServer(build_app(other, dialect="vllm")) as server:
        options: dict[str, Any] = {"backend": "vllm", "base_url": server.url, "assistant": str(tiny_artifact)}
        with UnlearnedClient(**options) as made, pytest.raises(TokenizerMismatch, match="split"):
            made.generate(PROMPT)
        with UnlearnedClient(**options, tokenizer=str(other)) as made:
            assert made.generate(PROMPT, max_new_tokens=4).report.alignment == "bridge"


def test_a_folder_that_holds_no_artifact(vllm_server: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactCorrupt):
        UnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=str(tmp_path))


def test_a_closed_client_says_so(vllm_server: Any, tiny_target: Path) -> None:
    made = UnlearnedClient(backend="vllm", base_url=vllm_server.url, tokenizer=str(tiny_target))
    made.close()
    made.close()
    with pytest.raises(UsageError, match="closed"):
        made.generate(PROMPT)


def test_min_p_and_top_p_order_is_known() -> None:
    both = Sampling(1.0, top_p=0.9, min_p=0.1)
    vllm = Capabilities("m", 20, exclusive=frozenset({"top_p", "min_p"}))
    assert not both.server_can(vllm)
    assert both.server_can(Capabilities("m", 20))


def test_llamacpp_reports_no_more_than_the_vocabulary(llamacpp_server: Any, tiny_target: Path, tiny_artifact: Path) -> None:
    options = {"base_url": llamacpp_server.url, "tokenizer": str(tiny_target), "assistant": str(tiny_artifact)}
    with UnlearnedClient(backend="llamacpp", top_logprobs=100_000, **options) as client:
        with pytest.warns(CapabilityWarning, match="the vocabulary has no more"):
            result = client.generate(PROMPT, max_new_tokens=6)
    with UnlearnedClient(backend="llamacpp", **options) as client:
        assert result.text == client.generate(PROMPT, max_new_tokens=6).text
    assert 0 < result.report.top_logprobs < 100_000
