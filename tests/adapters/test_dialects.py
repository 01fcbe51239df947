"""A backend of another kind than its server: the error says so, and which one fits; a wrong name of a model is told apart from that."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from uld_adapters import http
from uld_adapters.dialects import MARKS
from uld_adapters.errors import BackendError, ModelNotFound, RequestRejected, TokenizerMismatch
from uld_adapters.registry import create_backend


@pytest.mark.parametrize(
    ("backend", "server"),
    [(backend, server) for server in MARKS for backend in MARKS if backend != server and (backend, server) != ("openai", "llamacpp")],
)
async def test_a_wrong_backend_is_told_with_the_right_one(
    request: pytest.FixtureRequest, tiny_target: Path, backend: str, server: str
) -> None:
    url = request.getfixturevalue(f"{server}_server").url
    made = create_backend(backend, base_url=url, tokenizer=str(tiny_target))
    with pytest.raises(BackendError) as caught:
        await made.probe()
    await made.aclose()
    assert f"{url} does not look like {MARKS[backend][0]}: " in caught.value.message
    assert caught.value.hint == f"it looks like {MARKS[server][0]}: backend={server!r} (--backend {server})"
    assert not caught.value.retryable


def served(tokenizer: Path, backend: str, pages: dict[str, Any], **options: Any) -> tuple[Any, list[str]]:
    """A backend before a server of these pages, each JSON or a status with its words, and the paths that were asked for."""
    asked: list[str] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        page = pages.get(request.url.path, (404, '{"detail": "Not Found"}'))
        status, text = page if isinstance(page, tuple) else (200, json.dumps(page))
        return httpx2.Response(status, text=text)

    client = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    return create_backend(backend, base_url="http://server", tokenizer=str(tokenizer), http_client=client, **options), asked


@pytest.mark.parametrize("backend", list(MARKS))
@pytest.mark.parametrize("status", [404, 405])
async def test_a_server_of_no_known_kind(tiny_target: Path, backend: str, status: int) -> None:
    pages = dict.fromkeys(("/", "/info", "/v1/models", "/props", "/v1/chat/completions"), (status, "<h1>welcome</h1>"))
    made, _ = served(tiny_target, backend, pages)
    with pytest.raises(ModelNotFound, match=f"http://server does not look like {MARKS[backend][0]}: .*welcome") as caught:
        await made.probe()
    assert caught.value.hint == "check --backend and --base-url"
    assert caught.value.status == status


async def test_a_page_for_every_path_is_no_kind_of_server(tiny_target: Path) -> None:
    pages = {path: {"hello": "world"} for path in ("/info", "/version", "/v1/models")}
    made, _ = served(tiny_target, "llamacpp", pages)
    with pytest.raises(ModelNotFound, match=r"does not look like a llama\.cpp server") as caught:
        await made.probe()
    assert caught.value.hint == "check --backend and --base-url"


LISTING = {"data": [{"id": "tiny"}]}
UNKNOWN = (404, '{"error": {"message": "The model `another` does not exist.", "code": 404}}')


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_model_that_is_not_served_keeps_its_message(tiny_target: Path, route: str) -> None:
    pages = {"/v1/models": LISTING, "/v1/chat/completions": UNKNOWN, "/v1/completions": UNKNOWN}
    made, asked = served(tiny_target, "openai", pages, model="another", route=route)
    with pytest.raises(ModelNotFound, match="knows no such model: The model `another` does not exist") as caught:
        await made.probe()
    assert caught.value.hint == "check model=... (--model); the server lists its models at GET /v1/models"
    assert "/version" not in asked, "the kind of server is not in doubt"


async def test_a_server_of_the_right_kind_keeps_its_refusal(tiny_target: Path) -> None:
    pages = {"/version": {"version": "0.32"}, "/v1/models": LISTING, "/tokenize": (400, '{"error": {"message": "not today"}}')}
    made, _ = served(tiny_target, "vllm", pages)
    with pytest.raises(RequestRejected, match=r"http://server/tokenize rejected the request \(400\): not today") as caught:
        await made.probe()
    assert caught.value.hint == "change what the server names, or check that --backend fits it"


async def test_another_tokenizer_behind_a_proxy_is_still_another_tokenizer(tiny_target: Path) -> None:
    """Where /version is hidden, a vLLM looks like any server of the OpenAI kind."""
    made, _ = served(tiny_target, "vllm", {"/v1/models": LISTING, "/tokenize": {"tokens": [1, 2, 3]}})
    with pytest.raises(TokenizerMismatch, match="split"):
        await made.probe()


async def test_looking_for_the_kind_does_not_wait_for_a_busy_server(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 100.0)
    made, asked = served(tiny_target, "tgi", {"/version": (503, "busy"), "/props": {"default_generation_settings": {}}})
    with pytest.raises(ModelNotFound) as caught:
        await made.probe()
    assert caught.value.hint == "it looks like a llama.cpp server: backend='llamacpp' (--backend llamacpp)"
    assert asked.count("/version") == 1
