"""Completions that echo: given text scored in one request, only where the echo is just the tokens that were sent."""

import json
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

import tiny
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.engine import Engine
from uld_adapters.errors import LogprobsUnavailable, MalformedAnswer, TokenizerMismatch
from uld_adapters.openai.echo import read_echo
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.by_bytes import TokensByBytes
from uld_adapters.vocabulary.tokens import Vocabulary

WORDS = (b"<|bos|>", b"a", b"b", b" c", b"\xe6", b"\x9d", b"\xb1")
TOKENS = TokensByBytes(Vocabulary(WORDS, frozenset({0}), "toy"))


def report(*names: str) -> dict[str, Any]:
    """An echo of these names, each less probable than its rival "b"; nothing is told of the first."""
    count = len(names) - 1
    return {
        "tokens": list(names),
        "token_logprobs": [None, *[-2.0] * count],
        "top_logprobs": [None, *({name: -2.0, "b": -0.5} for name in names[1:])],
        "text_offset": list(range(count + 1)),
    }


@pytest.mark.parametrize("written", [(), ("a",)])
def test_an_echo_tells_every_token_but_the_first(written: tuple[str, ...]) -> None:
    positions = read_echo(report("a", " c", "a", *written), [1, 3, 1], TOKENS, wanted=1, added=False)
    assert positions[0] is None
    assert [top.ids.tolist() for top in positions if top is not None] == [[2, 3], [2, 1]]
    assert [top.of(token) for top, token in zip(positions, [1, 3, 1], strict=True) if top is not None] == [-2.0, -2.0]


@pytest.mark.parametrize("names", [("<|bos|>", "a", " c"), ("a", " c"), ("a", " c", "b")])
def test_a_first_token_that_the_server_adds_may_be_echoed_or_not(names: tuple[str, ...]) -> None:
    positions = read_echo(report(*names), [0, 1, 3], TOKENS, wanted=1, added=True)
    assert [top is None for top in positions] == [True, names[0] == "a", False]


def test_half_a_character_is_known_by_its_place() -> None:
    positions = read_echo(report("a", "", "\ufffd", "東", " c"), [1, 4, 5, 6, 3], TOKENS, wanted=1, added=False)
    assert [top.of(token) for top, token in zip(positions[1:], [4, 5, 6, 3], strict=True) if top is not None] == [-2.0] * 4


@pytest.mark.parametrize(
    "names",
    [
        ("a", " c", "b"),  # another token
        ("a", "", "a"),  # a whole character without a name
        ("a", " c"),  # too few
        ("a", " c", "a", "a", "a"),  # more than one written token
        ("token_id:1", "token_id:2", "token_id:1"),  # another id
    ],
)
def test_an_echo_of_other_tokens_is_another_tokenizers(names: tuple[str, ...]) -> None:
    with pytest.raises(TokenizerMismatch, match="echoes other tokens than the 3 that it was sent\n  fix: pass tokenizer="):
        read_echo(report(*names), [1, 3, 1], TOKENS, wanted=1, added=False)


def test_an_echo_that_lacks_a_field() -> None:
    for broken in (None, {}, {"tokens": []}, {**report("a", "b"), "token_logprobs": [None, None]}):
        with pytest.raises(MalformedAnswer, match="lack"):
            read_echo(broken, [1, 2], TOKENS, wanted=1, added=False)
    with pytest.raises(LogprobsUnavailable, match="without their rivals"):
        read_echo({**report("a", "b"), "top_logprobs": [None, None]}, [1, 2], TOKENS, wanted=1, added=False)


TEXT = "The captain saw a smile 😀 and the sea."


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> Engine:
    return Engine.load(tiny_target)


def rows(engine: Engine, ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return engine.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


@pytest.mark.parametrize("sends", ["ids", "text"])
async def test_a_server_that_echoes_scores_a_text_in_one_request(engine: Engine, tiny_target: Path, sends: str) -> None:
    app = build_app(engine, dialect="vllm")
    with EmulatorServer(app) as server:
        backend: Any = create_backend("openai", base_url=server.url, tokenizer=str(tiny_target), route="completions")
        assert (await backend.probe()).scoring == "prompt"
        backend._takes_ids = sends == "ids"
        ids = [*backend.tokenizer.encode(TEXT, add_special_tokens=False), backend.tokenizer.eos_token_id]
        before = app.state.stats.requests
        score = await backend.score(ids[:3], ids[3:])
        assert app.state.stats.requests == before + 1
        exact = rows(engine, ids)
        np.testing.assert_allclose(score.logprobs, [exact[at - 1, ids[at]] for at in range(3, len(ids))], atol=1e-4)
        for at, top in enumerate(score.positions, start=3):
            assert 1 <= top.ids.size <= 20
            np.testing.assert_allclose(top.logprobs, exact[at - 1, top.ids], atol=1e-4)
        await backend.aclose()


async def test_a_server_that_refuses_an_echo_scores_by_drafts(engine: Engine, tiny_target: Path) -> None:
    app = build_app(engine, dialect="openai")
    with EmulatorServer(app) as server:
        backend: Any = create_backend("openai", base_url=server.url, tokenizer=str(tiny_target), route="completions")
        assert (await backend.probe()).scoring == "drafts"
        ids = backend.tokenizer.encode(TEXT, add_special_tokens=False)
        before = app.state.stats.requests
        score = await backend.score(ids[:3], ids[3:])
        assert app.state.stats.requests > before + 1
        exact = rows(engine, ids)
        told = ~np.isnan(score.logprobs)
        np.testing.assert_allclose(score.logprobs[told], np.array([exact[at - 1, ids[at]] for at in range(3, len(ids))])[told], atol=1e-4)
        await backend.aclose()


@pytest.mark.parametrize("ways", ["ignored", "shifted"])
async def test_an_echo_that_cannot_be_relied_on_is_not_used(engine: Engine, tiny_target: Path, ways: str) -> None:
    """A server that takes the word and does nothing, and one that tells each position's values at the next."""
    app = build_app(engine, dialect="vllm")
    inner = httpx2.ASGITransport(app=app)

    class Between(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            body = json.loads(request.content) if request.content else {}
            if not body.get("echo"):
                return await inner.handle_async_request(request)
            if ways == "ignored":
                plain = {name: value for name, value in body.items() if name != "echo"}
                return await inner.handle_async_request(httpx2.Request("POST", request.url, json=plain))
            whole = await inner.handle_async_request(request)
            answer = json.loads(await whole.aread())
            lists = answer["choices"][0]["logprobs"]
            tops = lists["top_logprobs"]
            lists["top_logprobs"] = [None, tops[1], *tops[1:-1]]
            return httpx2.Response(200, json=answer)

    async with httpx2.AsyncClient(transport=Between()) as client:
        place = {"base_url": "http://server", "route": "completions", "http_client": client}
        backend: Any = create_backend("openai", tokenizer=str(tiny_target), **place)
        assert (await backend.probe()).scoring == "drafts"


async def test_a_first_token_of_the_servers_own_does_not_move_the_scores(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "bos", bos=True)
    engine = Engine.load(folder)
    with EmulatorServer(build_app(engine, dialect="vllm")) as server:
        backend: Any = create_backend("openai", base_url=server.url, tokenizer=str(folder), route="completions")
        assert (await backend.probe()).scoring == "prompt"
        backend._takes_ids = False
        ids = backend.tokenizer.encode("The sea and the river")
        assert ids[0] == backend.tokenizer.bos_token_id
        score = await backend.score(ids[:2], ids[2:])
        exact = rows(engine, ids)
        np.testing.assert_allclose(score.logprobs, [exact[at - 1, ids[at]] for at in range(2, len(ids))], atol=1e-4)
        await backend.aclose()
