"""Keywords of the clients: one list for both forms, shown in every signature; wrong names and values are answered at once."""

import inspect
import pydoc
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from uld_adapters.errors import UnknownName, UsageError
from uld_sdk import AsyncUnlearnedClient, UnlearnedClient
from uld_sdk.options import Connection, ConnectionKeywords, Generation, GenerationKeywords, ScoreKeywords, Scoring

SETS = [(Connection, ConnectionKeywords), (Generation, GenerationKeywords), (Scoring, ScoreKeywords)]
METHODS = {"__init__", "generate", "chat", "stream", "generate_many", "score", "close", "add_assistant", "remove_assistant"}
NOWHERE: dict[str, Any] = {"backend": "vllm", "base_url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(("options", "keywords"), SETS)
def test_type_checkers_and_python_know_the_same_options(options: type, keywords: type) -> None:
    assert get_type_hints(options) == get_type_hints(keywords)
    assert not keywords.__required_keys__  # type: ignore[attr-defined]
    told = [line.split(":")[0].strip() for line in (options.__doc__ or "").splitlines() if ": " in line]
    assert told == list(inspect.signature(options).parameters), "each option is described, in order"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_both_clients_have_one_signature(name: str) -> None:
    sync, waiting = (inspect.signature(getattr(client, name)) for client in (UnlearnedClient, AsyncUnlearnedClient))
    assert sync.parameters == waiting.parameters
    kinds = {parameter.kind for parameter in sync.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_the_clients_have_the_same_methods() -> None:
    public = [{name for name in vars(client) if not name.startswith("_")} for client in (UnlearnedClient, AsyncUnlearnedClient)]
    assert public[0] == public[1] == METHODS - {"__init__"} | {"capabilities", "assistants"}


def test_help_lists_each_option_with_its_default_and_what_it_is() -> None:
    page = pydoc.plain(pydoc.render_doc(UnlearnedClient.generate))
    assert "max_new_tokens: int = 256" in page
    assert "temperature: 0 takes the most probable token" in page
    page = pydoc.plain(pydoc.render_doc(AsyncUnlearnedClient))
    assert "timeout: seconds that a server may be silent" in page


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_tokens", "max_new_tokens"), ("temprature", "temperature"), ("stops", "stop"), ("topp", "top_p"), ("logits", None)],
)
def test_a_wrong_keyword_is_answered_with_the_nearest_right_one(wrong: str, right: str | None) -> None:
    expected = f"did you mean {right!r}" if right else "choose one of"
    options: dict[str, Any] = {wrong: 5}
    with UnlearnedClient(**NOWHERE) as client:
        calls: list[Any] = [
            lambda: client.generate("hi", **options),
            lambda: client.chat([{"role": "user", "content": "hi"}], **options),
            lambda: list(client.stream("hi", **options)),
            lambda: client.generate_many([], **options),
        ]
        for call in calls:
            with pytest.raises(UnknownName, match=expected):
                call()


async def test_a_slip_in_any_other_keyword(vllm_server: Any) -> None:
    slip: dict[str, Any] = {"concurency": 2}
    for form in (UnlearnedClient, AsyncUnlearnedClient):
        with pytest.raises(UsageError, match="did you mean 'base_url'"):
            form(**{"backend": "vllm", "base_ur": "http://x"})  # type: ignore[arg-type]
    client = AsyncUnlearnedClient(**NOWHERE)
    with pytest.raises(UsageError, match="did you mean 'concurrency'"):
        await client.generate_many(["hi"], **slip)
    with pytest.raises(UsageError, match="unknown option 'rwa'"):
        await client.score("hi", "there", **{"rwa": True})  # type: ignore[arg-type]
    await client.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', not a whole number"),
        ({"max_new_tokens": 2.0}, "not a whole number"),
        ({"max_new_tokens": True}, "not a whole number"),
        ({"max_new_tokens": None}, "not a whole number"),
        ({"temperature": "warm"}, "temperature is 'warm', not a number"),
        ({"top_p": "0.9"}, "top_p is '0.9', not a number"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": 2**63}, r"seed is 9223372036854775808\n  fix: give a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": b"x"}, "stop is b'x'"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"raw": "yes"}, "raw is 'yes', not True or False"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_before_any_request(options: dict[str, Any], says: str) -> None:
    with UnlearnedClient(**NOWHERE) as client, pytest.raises(UsageError, match=says):
        client.generate("hi", **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"api_key": "schlüssel"}, "api_key holds characters"),
        ({"api_key": "key\n"}, "api_key holds characters"),
        ({"base_url": "http://[::1"}, r"'http://\[::1' is not an http address"),
        ({"base_url": "http://"}, "names no host"),
        ({"base_url": 8080}, "base_url is 8080, not text"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": "a minute"}, "timeout is 'a minute'"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"top_logprobs": 5.5}, "top_logprobs is 5.5"),
        ({"margin": "3"}, "margin is '3'"),
        ({"draft": True}, "draft is True"),
        ({"backend": None}, "backend is None"),
        ({"target_device": "cuda"}, "for a model in this process"),
    ],
)
def test_a_client_option_of_the_wrong_kind_is_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        UnlearnedClient(**{**NOWHERE, **options})


def test_the_key_is_not_told() -> None:
    with pytest.raises(UsageError) as caught:
        UnlearnedClient(**NOWHERE, api_key="schlüssel")
    assert "schl" not in str(caught.value)
    assert "secret" not in repr(Connection(api_key="secret"))


def test_the_largest_seed_draws(tiny_target: Path) -> None:
    with UnlearnedClient(backend="hf", model=str(tiny_target)) as client:
        result = client.generate("Who opens the shop?", max_new_tokens=2, temperature=1.0, seed=2**63 - 1)
    assert result.report.mode == "match"


def test_numbers_of_numpy_are_numbers() -> None:
    asked = Generation(max_new_tokens=np.int64(5), temperature=np.float32(0.5), top_p=1)
    assert [type(value) for value in (asked.max_new_tokens, asked.temperature, asked.top_p)] == [int, float, float]


def test_many_prompts_are_a_list() -> None:
    with UnlearnedClient(**NOWHERE) as client:
        with pytest.raises(UsageError, match="prompts is str, not a list"):
            client.generate_many("Who opens the shop?")
        with pytest.raises(UsageError, match="concurrency is 0"):
            client.generate_many([], concurrency=0)
