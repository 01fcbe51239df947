"""A borrowed chat template: used without a word where the server renders alike, doubted aloud elsewhere."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from uld_adapters.chat_rendering import renders_alike
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.registry import create_backend
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer
from uld_sdk import UnlearnedClient
from uld_sdk.templates import TemplateWarning

QUESTION = "Who opens the shop?"


@pytest.fixture(scope="module")
def polite(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target under another name and with another chat template."""
    folder = Path(shutil.copytree(tiny_target, tmp_path_factory.mktemp("polite") / "polite-model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|user|>Please: ' + m['content'] }}{% endfor %}<|assistant|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reached(polite: Path, tiny_artifact: Path) -> Iterator[dict[str, Any]]:
    with EmulatorServer(build_app(polite, dialect="vllm")) as server:
        yield {"backend": "vllm", "base_url": server.url, "assistant": str(tiny_artifact)}


def test_another_form_is_told_once(reached: dict[str, Any]) -> None:
    with UnlearnedClient(**reached) as client:
        client.generate(QUESTION, max_new_tokens=1, raw=True)  # renders nothing
        with pytest.warns(TemplateWarning, match=r"polite-model renders messages in another form; pass tokenizer=\.\.\.") as told:
            client.generate(QUESTION, max_new_tokens=1)
        assert len(told) == 1
        client.generate(QUESTION, max_new_tokens=1)


def test_a_tokenizer_of_its_own_ends_the_doubt(reached: dict[str, Any], polite: Path) -> None:
    with UnlearnedClient(**reached, tokenizer=str(polite)) as client:
        asked = client.generate(QUESTION, max_new_tokens=1).usage.prompt_tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TemplateWarning)
        with UnlearnedClient(**reached) as client:
            assert client.generate(QUESTION, max_new_tokens=1).usage.prompt_tokens < asked, "another template, another prompt"


@pytest.mark.parametrize("dialect", ["vllm", "tgi"])
def test_another_name_alone_is_no_reason_where_the_server_tells(dialect: str, tiny_target: Path, tiny_artifact: Path) -> None:
    app = build_app(tiny_target, dialect=dialect, model_id="owner/served", max_top_n_tokens=20)
    with EmulatorServer(app) as server, UnlearnedClient(backend=dialect, base_url=server.url, assistant=str(tiny_artifact)) as client:
        if dialect == "vllm":
            assert client.generate(QUESTION, max_new_tokens=1).token_ids
        else:  # the emulated TGI has no /chat_tokenize
            with pytest.warns(TemplateWarning, match="does not tell how owner/served renders"):
                client.generate(QUESTION, max_new_tokens=1)


def test_llamacpp_tells(tiny_gguf: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    """A GGUF file without a template is rendered by llama.cpp's own."""
    from uld_sdk.demo.server import LlamaCppServer

    file = Path(shutil.copy(tiny_gguf, tmp_path / "another.gguf"))
    with LlamaCppServer(file, parallel=1, context=256) as server:
        options: dict[str, Any] = {"backend": "llamacpp", "base_url": server.url, "assistant": str(tiny_artifact)}
        with UnlearnedClient(**options) as client, pytest.warns(TemplateWarning, match=r"another\.gguf renders messages in another form"):
            client.generate(QUESTION, max_new_tokens=1)


TEMPLATED = "<|user|>Hello<|assistant|>"


@pytest.mark.parametrize(
    ("status", "answer", "template", "alike"),
    [
        (200, {"tokenize_response": [{"id": 1, "text": "a", "start": 0, "stop": 1}], "templated_text": TEMPLATED}, True, True),
        (200, {"tokenize_response": [], "templated_text": f"<|bos|>{TEMPLATED}"}, True, True),
        (200, {"tokenize_response": [], "templated_text": "USER: Hello"}, True, False),
        (200, {"tokenize_response": [], "templated_text": TEMPLATED}, False, False),
        (200, {"unexpected": 1}, True, None),
        (422, {"error": "Template error: template not found", "error_type": "template_error"}, True, None),
        (422, {"error": "Template error: template not found", "error_type": "template_error"}, False, True),
        (404, {"error": "no such route"}, True, None),
    ],
)
async def test_what_tgi_may_answer(status: int, answer: Any, template: bool, alike: bool | None, tiny_target: Path) -> None:
    asked: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(status, json=answer)

    tokenizer = load_tokenizer(tiny_target)
    if not template:
        tokenizer.chat_template = None
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(handle)) as http:
        backend = create_backend("tgi", base_url="http://server", tokenizer=tokenizer, http_client=http)
        assert await renders_alike(backend, tokenizer) is alike
    assert [request.url.path for request in asked] == ["/chat_tokenize"]


def test_a_tokenizer_without_a_template_is_told(tiny_target: Path, tiny_artifact: Path) -> None:
    bare = Vocabulary.from_hf(load_tokenizer(tiny_target))
    with EmulatorServer(build_app(tiny_target, dialect="openai")) as server:
        options = {"backend": "openai", "base_url": f"{server.url}/v1", "tokenizer": bare, "top_logprobs": 5}
        with UnlearnedClient(**options, route="completions", assistant=str(tiny_artifact)) as client:
            client.generate("go on:", max_new_tokens=1, raw=True)
            with pytest.warns(TemplateWarning, match=r"no chat template.*pass tokenizer=\.\.\. .* route='chat'"):
                client.generate(QUESTION, max_new_tokens=1)
        with UnlearnedClient(**options, route="chat", assistant=str(tiny_artifact)) as client:
            client.generate(QUESTION, max_new_tokens=1)
