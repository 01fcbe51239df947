"""Prompts as token ids: the assistant's as its training rendered them, and none that does not fit."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tiny
from tiny_rows import FORGET, RETAIN
from uld_adapters.errors import ContextExceeded, UsageError
from uld_offset_models.data import Example
from uld_offset_models.encoding import encode
from uld_sdk import AsyncUnlearnedClient, UnlearnedClient, train
from uld_sdk.prompts import Prompt, render, render_as_trained

QUESTION = "Who kept the lamp?"
TALK = (("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello."), ("user", QUESTION))
NOWHERE: dict[str, Any] = {"backend": "vllm", "base_url": "http://127.0.0.1:9"}


def as_prompt(messages: tuple[tuple[str, str], ...]) -> Prompt:
    return [{"role": role, "content": content} for role, content in messages]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("messages", [(("user", QUESTION),), TALK])
def test_an_assistant_reads_prompts_as_in_training(
    bos: bool, chat_template: bool, messages: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, bos=bos)
    row = encode(tokenizer, [Example(messages, "Ada did.", "x:1")], chat_template=chat_template, max_length=200)[0]
    prompt: Prompt = QUESTION if len(messages) == 1 else as_prompt(messages)
    assert render_as_trained(tokenizer, prompt, chat_template=chat_template) == list(row.ids[: row.start])
    assert render_as_trained(tokenizer, as_prompt(messages), chat_template=chat_template) == list(row.ids[: row.start])


@pytest.mark.parametrize("bos", [False, True])
def test_raw_text_begins_as_plain_rows_do(bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, bos=bos)
    row = encode(tokenizer, [Example((), "The river runs", "x:1", plain=True)], chat_template=True, max_length=99)[0]
    for chat_template in (False, True):
        ids = render_as_trained(tokenizer, "The river runs", raw=True, chat_template=chat_template)
        assert ids == list(row.ids[:-1]), "all but the end token"


async def test_the_manifest_decides_how_the_assistant_reads(
    tiny_target: Path, vllm_server: Any, tiny_artifact: Path, tmp_path: Path
) -> None:
    """Trained without the template, it reads without it, and knows what it was trained on."""
    data: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "progress": False, "dtype": "float32", "device": "cpu"}
    plain = await asyncio.to_thread(train, base=tiny_target, output=tmp_path / "plain", steps=30, chat_template=False, **data)
    assert plain.manifest.chat_template is False
    for folder, wanted in ((tiny_artifact, f"<|user|>{QUESTION}<|assistant|>"), (plain.path, f"{QUESTION}\n")):
        options: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "assistant": str(folder)}
        async with AsyncUnlearnedClient(**options, on_touched="refuse") as client:
            await client.capabilities()
            assert client._small is not None
            (side,) = client._small.sides
            assert side.tokenizer.decode(side.reader(QUESTION, raw=False, new=4).prompt) == wanted
            asked = client.backend.tokenizer.decode(client._about(QUESTION, raw=False)[1])
            assert asked == f"<|user|>{QUESTION}<|assistant|>", "the large model's prompt stays its own"
            assert (await client.generate(FORGET[0]["question"], max_new_tokens=12)).finish_reason == "refusal"


def test_an_assistant_with_a_short_context_says_so(tiny_target: Path, vllm_server: Any, tmp_path: Path) -> None:
    base = tiny.tiny_model(tmp_path / "short", context=80)
    data: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "progress": False, "dtype": "float32", "device": "cpu"}
    made = train(base=base, output=tmp_path / "assistant", steps=1, **data)
    reach: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "assistant": str(made.path), "tokenizer": str(tiny_target)}
    with UnlearnedClient(**reach) as client:
        size = client.generate(QUESTION, max_new_tokens=1).usage.prompt_tokens
        assert client.generate(QUESTION, max_new_tokens=80 - size).usage.completion_tokens <= 80 - size
        expected = rf"{size} prompt tokens and {81 - size} new ones exceed the assistant's context of 80"
        with pytest.raises(ContextExceeded, match=expected) as caught:
            client.generate(QUESTION, max_new_tokens=81 - size)
        assert caught.value.hint == f"max_new_tokens can be at most {80 - size}"
        with pytest.raises(ContextExceeded, match="the assistant's context of 80"):
            client.score(QUESTION, "the lamp " * 60)
        with pytest.raises(ContextExceeded, match="shorten the prompt"):
            client.generate("the lamp " * 60, max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        (None, {}, "NoneType, neither text nor messages"),
        (5, {}, "int, neither text nor messages"),
        ("", {}, "the prompt is empty"),
        (" \n", {}, "the prompt is empty"),
        ("", {"raw": True}, "the prompt is empty"),
        (None, {"raw": True}, "takes text"),
        ([], {}, "no messages"),
        (["hi"], {}, "neither text nor messages"),
        ([{"role": "user"}], {}, "a role and a content"),
        ([{"role": "user", "content": None}], {}, "as text"),
        (b"hi", {}, "bytes, neither text nor messages"),
    ],
)
def test_a_prompt_that_is_none_is_refused_before_any_request(prompt: Any, options: dict[str, Any], says: str) -> None:
    with UnlearnedClient(**NOWHERE) as client:
        with pytest.raises(UsageError, match=says):
            client.generate(prompt, **options)
        with pytest.raises(UsageError, match=says):
            client.score(prompt, "text", **options)
        with pytest.raises(UsageError, match="continuation is NoneType"):
            client.score("hi", None)  # type: ignore[arg-type]


def test_a_template_that_refuses_is_told(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="the model's chat template refuses these messages: roles must alternate"):
        render(tokenizer, "hi")
    with pytest.raises(UsageError, match="the assistant's chat template refuses"):
        render_as_trained(tokenizer, "hi", chat_template=True)


@pytest.mark.parametrize(
    ("prompt", "raw", "says"),
    [
        ("a\udcff", True, r"the prompt is not valid Unicode: the character at place 1, U\+DCFF"),
        ("\ud800", False, r"the prompt is not valid Unicode: the character at place 0, U\+D800"),
        ([{"role": "user", "content": "Hi"}, {"role": "user", "content": "\ud800"}], False, "the content of message 2 is not valid"),
    ],
)
def test_a_prompt_is_unicode(prompt: Prompt, raw: bool, says: str, tiny_target: Path) -> None:
    with UnlearnedClient(**NOWHERE, tokenizer=str(tiny_target)) as client:
        for ask in (client.generate, lambda prompt, **options: client.score(prompt, "x", **options)):
            with pytest.raises(UsageError, match=says) as caught:
                ask(prompt, raw=raw)
            assert "UTF-8" in caught.value.hint
        with pytest.raises(UsageError, match="the continuation is not valid Unicode"):
            client.score(QUESTION, "a\ud800")
