"""The emulator's OpenAI dialect: over the wire, and as the official client sees it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from scripted_engine import scripted
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.desk import Step
from uld_adapters.emulator.engine import Engine, Row, Session
from uld_adapters.emulator.openai_text import Telling
from uld_adapters.errors import UnknownName

QUESTION = "Who wrote the book about the sea?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = "The lighthouse"
MODEL = "tiny-target"


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> Engine:
    return Engine.load(tiny_target)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[EmulatorServer]:
    with EmulatorServer(build_app(engine, dialect="openai")) as server:
        yield server


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=30) as client:
        yield client


def chat(http: httpx2.Client, server: EmulatorServer, **body: Any) -> httpx2.Response:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "logprobs": True, **body}
    return http.post(server.url + "/v1/chat/completions", json={name: value for name, value in body.items() if value is not None})


def complete(http: httpx2.Client, server: EmulatorServer, **body: Any) -> httpx2.Response:
    return http.post(server.url + "/v1/completions", json={"model": MODEL, "prompt": PROMPT, "temperature": 0, **body})


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def pieces(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(text, add_special_tokens=False)


def rows_after(engine: Engine, ids: list[int], n: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens and log-probabilities, everything computed anew for each token."""
    ids, rows = list(ids), []
    for _ in range(n):
        with torch.inference_mode():
            rows.append(engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).numpy())
        ids.append(int(rows[-1].argmax()))
    return ids[-n:], rows


def rendered(engine: Engine, messages: list[dict[str, str]], **how: Any) -> list[int]:
    return list(engine.tokenizer.apply_chat_template(messages, return_dict=True, **(how or {"add_generation_prompt": True}))["input_ids"])


def test_chat_reports_what_the_model_says(server: EmulatorServer, engine: Engine, http: httpx2.Client) -> None:
    prompt = rendered(engine, MESSAGES)
    tokens, rows = rows_after(engine, prompt, 8)
    answer = chat(http, server, max_tokens=8, top_logprobs=20)
    assert answer.headers["x-request-id"].startswith("req_")
    data = answer.json()
    assert (data["object"], data["model"], data["system_fingerprint"]) == ("chat.completion", MODEL, "fp_emulated")
    (choice,) = data["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].encode() == engine.tokenizer.decode(tokens).encode()
    assert data["usage"]["prompt_tokens"] == len(prompt)
    assert (data["usage"]["completion_tokens"], data["usage"]["total_tokens"]) == (8, len(prompt) + 8)
    for row, token, entry in zip(rows, tokens, choice["logprobs"]["content"], strict=True):
        best = np.argsort(-row, kind="stable")[:20]
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-5)
        assert [e["logprob"] for e in entry["top_logprobs"]] == pytest.approx(row[best].tolist(), abs=1e-5)
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
    said = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert said.decode("utf-8", "replace") == choice["message"]["content"]


def test_log_probabilities_come_when_asked_for(server: EmulatorServer, http: httpx2.Client) -> None:
    assert chat(http, server, max_tokens=2, logprobs=None).json()["choices"][0]["logprobs"] is None
    (choice,) = chat(http, server, max_tokens=2).json()["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]
    assert complete(http, server, max_tokens=2).json()["choices"][0]["logprobs"] is None


def test_log_probabilities_are_raw(server: EmulatorServer, http: httpx2.Client) -> None:
    plain, warm = (chat(http, server, max_tokens=1, top_logprobs=9, **options).json() for options in ({}, {"temperature": 2, "seed": 1}))
    first, second = (data["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for data in (plain, warm))
    assert first == second


def test_an_unlikely_token_has_no_value_of_its_own(server: EmulatorServer, http: httpx2.Client) -> None:
    answer = chat(http, server, max_tokens=60, temperature=2, seed=3, top_logprobs=20).json()
    content = answer["choices"][0]["logprobs"]["content"]
    outside = [entry for entry in content if entry["bytes"] not in [other["bytes"] for other in entry["top_logprobs"]]]
    assert outside
    assert {entry["logprob"] for entry in outside} == {-9999.0}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}, {"stop": ["e"]}])
def test_both_routes_stream_what_they_answer(server: EmulatorServer, http: httpx2.Client, sampling: dict[str, Any]) -> None:
    options = {"max_tokens": 30, **sampling}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    whole = chat(http, server, top_logprobs=3, **options).json()
    chunks = events(chat(http, server, top_logprobs=3, **options, **streaming).text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": whole["choices"][0]["finish_reason"]}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["choices"][0]["message"]["content"]
    told = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"]

    whole = complete(http, server, logprobs=3, **options).json()
    chunks = events(complete(http, server, logprobs=3, **options, **streaming).text)
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert chunks[-1]["usage"] == whole["usage"]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][name]] == values


def test_completions_name_tokens_by_strings_at_their_places(server: EmulatorServer, engine: Engine, http: httpx2.Client) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    tokens, rows = rows_after(engine, ids, 6)
    by_text = complete(http, server, max_tokens=6, logprobs=5).json()
    by_ids = complete(http, server, prompt=ids, max_tokens=6, logprobs=5).json()
    assert by_text["choices"] == by_ids["choices"]
    assert complete(http, server, prompt=[ids], max_tokens=6, logprobs=5).json()["choices"] == by_ids["choices"]
    (choice,) = by_text["choices"]
    report = choice["logprobs"]
    assert report["text_offset"][0] == len(PROMPT)
    assert report["token_logprobs"] == pytest.approx([float(row[token]) for row, token in zip(rows, tokens, strict=True)], abs=1e-5)
    assert all(len(entries) == 5 for entries in report["top_logprobs"])
    echoed = complete(http, server, max_tokens=6, echo=True).json()["choices"][0]
    assert echoed["text"] == PROMPT + choice["text"]


def test_half_characters_are_told_by_their_bytes(engine: Engine, http: httpx2.Client) -> None:
    snow = pieces(engine, "東")
    halves = [engine.tokenizer.convert_ids_to_tokens(i) for i in snow]
    assert len(halves) == 3
    script = [*snow, *pieces(engine, "x"), *snow[:2]]
    with scripted(engine, *script, prompt=len(rendered(engine, MESSAGES)), dialect="openai", model_id=MODEL) as server:
        (choice,) = chat(http, server, max_tokens=6, top_logprobs=1).json()["choices"]
        assert choice["message"]["content"] == "東x\ufffd"
        content = choice["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in content) == "東x".encode() + "東".encode()[:2]
        assert content[0]["token"] == "\\xe6"
        chunks = [chunk["choices"][0] for chunk in events(chat(http, server, max_tokens=6, top_logprobs=1, stream=True).text)]
        sizes = [(c["delta"]["content"], len(c["logprobs"]["content"])) for c in chunks[1:-1]]
        assert sizes == [("東", 3), ("x", 1), ("\ufffd", 2)]
    with scripted(engine, *script, prompt=len(engine.tokenizer.encode(PROMPT)), dialect="openai", model_id=MODEL) as server:
        report = complete(http, server, max_tokens=6, logprobs=1).json()["choices"][0]["logprobs"]
        assert report["tokens"] == ["bytes:\\xe6", "bytes:\\x9d", "bytes:\\xb1", "x", "bytes:\\xe6", "bytes:\\x9d"]
        assert [offset - len(PROMPT) for offset in report["text_offset"]] == [0, 0, 0, 1, 2, 2]


def test_no_text_comes_before_its_tokens() -> None:
    """A token may end one character and begin another: neither is told before the second is whole."""
    telling = Telling(())
    row = np.zeros(3, dtype=np.float32)
    told = []
    for number, data in enumerate((b"a\xe6", b"\x9d\xb1b\xe6", b"\x9d", b"\xb1")):
        telling.push(Step(number, row, row), data)
        text, ready = telling.take(last=False)
        told.append((text, [step.token for step, _ in ready]))
    assert told == [("", []), ("", []), ("", []), ("a東b東", [0, 1, 2, 3])]


def test_a_server_without_bytes_tells_half_characters_as_one(engine: Engine, http: httpx2.Client) -> None:
    snow = pieces(engine, "東")
    options: dict[str, Any] = {"dialect": "openai", "model_id": MODEL, "token_bytes": False}
    with scripted(engine, *snow, prompt=len(rendered(engine, MESSAGES)), **options) as server:
        content = chat(http, server, max_tokens=3, top_logprobs=20).json()["choices"][0]["logprobs"]["content"]
        assert {(entry["token"], entry["bytes"]) for entry in content} == {("\ufffd", None)}
        assert content[0]["top_logprobs"][0]["bytes"] is None
    with scripted(engine, *snow, prompt=len(engine.tokenizer.encode(PROMPT)), **options) as server:
        report = complete(http, server, max_tokens=3, logprobs=5).json()["choices"][0]["logprobs"]
        assert report["tokens"] == ["\ufffd"] * 3
        assert min(len(entries) for entries in report["top_logprobs"]) <= 5


def test_the_end_token_is_told_by_completions_only(engine: Engine, http: httpx2.Client) -> None:
    word = pieces(engine, " stone")
    end = engine.tokenizer.eos_token_id
    with scripted(engine, *word, end, prompt=len(rendered(engine, MESSAGES)), dialect="openai", model_id=MODEL) as server:
        data = chat(http, server, max_tokens=20, top_logprobs=1).json()
        (choice,) = data["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (" stone", "stop")
        assert len(choice["logprobs"]["content"]) == len(word)
        assert data["usage"]["completion_tokens"] == len(word) + 1
        (choice,) = chat(http, server, max_tokens=20, stop="on").json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (" st", "stop")
    with scripted(engine, *word, end, prompt=len(engine.tokenizer.encode(PROMPT)), dialect="openai", model_id=MODEL) as server:
        (choice,) = complete(http, server, max_tokens=20, logprobs=1).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (" stone", "stop")
        assert choice["logprobs"]["tokens"][-1] == "<|eos|>"


def refusal(message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (
            {"top_logprobs": 21},
            400,
            refusal(
                "Invalid 'top_logprobs': integer above maximum value. Expected a value <= 20, but got 21 instead.",
                "top_logprobs",
                "integer_above_max_value",
            ),
        ),
        (
            {"logprobs": None, "top_logprobs": 2},
            400,
            refusal("The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", "top_logprobs"),
        ),
        ({"model": "gpt"}, 404, refusal("The model `gpt` does not exist or you do not have access to it.", None, "model_not_found")),
        ({"model": None}, 400, refusal("you must provide a model parameter")),
        ({"messages": None}, 400, refusal("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")),
        ({"top_k": 5}, 400, refusal("Unrecognized request argument supplied: top_k")),
        ({"continue_final_message": True}, 400, refusal("Unrecognized request argument supplied: continue_final_message")),
        (
            {"messages": [{"role": "assistant", "content": "a", "prefix": True}]},
            400,
            refusal("Unknown parameter: 'messages[0].prefix'.", "messages[0].prefix", "unknown_parameter"),
        ),
        (
            {"temperature": 3},
            400,
            refusal(
                "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3.0 instead.",
                "temperature",
                "decimal_above_max_value",
            ),
        ),
        ({"stop": list("abcde")}, 400, None),
        ({"messages": []}, 400, None),
        ({"messages": "hi"}, 400, None),
        ({"max_tokens": 0}, 400, None),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 400, None),
        ({"stream_options": {"include_usage": True}}, 400, None),
        (
            {"max_tokens": 510},
            400,
            refusal(
                "This model's maximum context length is 512 tokens. However, you requested 526 tokens (16 in the messages, 510 in the"
                " completion). Please reduce the length of the messages or completion.",
                "messages",
                "context_length_exceeded",
            ),
        ),
    ],
)
def test_chat_refuses_in_the_apis_own_words(
    server: EmulatorServer, http: httpx2.Client, body: dict[str, Any], status: int, told: dict[str, Any] | None
) -> None:
    for stream in (False, True):
        if "stream_options" in body and stream:
            continue
        answer = chat(http, server, stream=stream, **body)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert told is None or answer.json() == told


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"logprobs": 20}, "20 is greater than the maximum of 5 - 'logprobs'"),
        ({"logprobs": 1, "echo": True}, "Setting 'echo' and 'logprobs' at the same time"),
        ({"prompt": ["a", "b"]}, "several prompts"),
        ({"prompt": []}, "empty"),
        ({"prompt": [99999]}, "out of range"),
        ({"best_of": 2}, "Unrecognized request argument supplied: best_of"),
    ],
)
def test_completions_refuse(server: EmulatorServer, http: httpx2.Client, body: dict[str, Any], told: str) -> None:
    answer = complete(http, server, **body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_broken_json_and_addresses_that_are_none(server: EmulatorServer, http: httpx2.Client) -> None:
    answer = http.post(server.url + "/v1/chat/completions", content="{")
    assert answer.status_code == 400
    assert "could not parse the JSON body" in answer.json()["error"]["message"]
    answer = http.get(server.url + "/v1/engines")
    assert (answer.status_code, answer.json()) == (404, refusal("Invalid URL (GET /v1/engines)"))
    answer = http.get(server.url + "/v1/models/none")
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_server_may_take_no_ids(engine: Engine, http: httpx2.Client) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", token_prompts=False)) as server:
        assert complete(http, server, prompt=[1, 2]).json()["error"]["param"] == "prompt"
        assert complete(http, server).status_code == 200


ASKING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "plain": ({}, {}),
    "continue_final_message": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "prefix": ({"prefix": True}, {}),
}


@pytest.mark.parametrize("kind", ASKING)
def test_a_begun_answer_goes_on_where_the_server_can(engine: Engine, http: httpx2.Client, kind: str) -> None:
    in_message, in_body = ASKING[kind]
    begun = {"role": "assistant", "content": " The captain"}
    opened = rendered(engine, [*MESSAGES, begun], continue_final_message=True)
    closed = rendered(engine, [*MESSAGES, begun], add_generation_prompt=True)
    with EmulatorServer(build_app(engine, dialect="openai", prefill=kind)) as server:
        data = chat(http, server, messages=[*MESSAGES, begun | in_message], max_tokens=4, **in_body).json()
        assert data["usage"]["prompt_tokens"] == len(closed if kind == "none" else opened)
        expected, _ = rows_after(engine, closed if kind == "none" else opened, 4)
        assert data["choices"][0]["message"]["content"] == engine.tokenizer.decode(expected)
        fresh = chat(http, server, max_tokens=4).json()
        assert fresh["usage"]["prompt_tokens"] == len(rendered(engine, MESSAGES))


def test_an_unknown_prefill_names_the_known_ones(engine: Engine) -> None:
    with pytest.raises(UnknownName, match="continue_final_message"):
        build_app(engine, dialect="openai", prefill="prefx")


def test_every_route_asks_for_the_key(engine: Engine, http: httpx2.Client) -> None:
    with EmulatorServer(build_app(engine, dialect="openai", api_key="secret")) as server:
        for answer in (http.get(server.url + "/v1/models"), chat(http, server)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.get(server.url + "/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


class Failing(Engine):
    async def next(self, session: Session) -> Row:
        if len(session.ids) > 15:
            raise RuntimeError("out of memory")
        return await super().next(session)


def test_a_failing_model_is_told(engine: Engine, http: httpx2.Client) -> None:
    with EmulatorServer(build_app(Failing(engine.model, engine.tokenizer, name=MODEL), dialect="openai")) as server:
        answer = chat(http, server, max_tokens=5)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        streamed = events(chat(http, server, max_tokens=5, stream=True).text)
        assert "out of memory" in streamed[-1]["error"]["message"]


# --- the official client


@pytest.fixture
def official(server: EmulatorServer) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="the official client is not installed (extra dev)")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_official_client_reads_the_answers(official: Any) -> None:
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    whole = official.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=20, **options)
    assert whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 20
    assert whole.usage.completion_tokens == 6
    assert whole._request_id.startswith("req_")
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    with official.chat.completions.create(messages=MESSAGES, logprobs=True, **streaming, **options) as stream:
        chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    text = official.completions.create(prompt=PROMPT, logprobs=5, **options)
    assert len(text.choices[0].logprobs.tokens) == 6
    with official.completions.create(prompt=PROMPT, logprobs=5, stream=True, **options) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text.choices[0].text
    assert [model.id for model in official.models.list()] == [official.models.retrieve(MODEL).id] == [MODEL]


def test_the_official_client_understands_the_refusals(official: Any, engine: Engine) -> None:
    import openai

    create = official.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=21)
    assert (refused.value.param, refused.value.code) == ("top_logprobs", "integer_above_max_value")
    with (
        EmulatorServer(build_app(engine, dialect="openai", api_key="secret")) as guarded,
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    failing = build_app(Failing(engine.model, engine.tokenizer, name=MODEL), dialect="openai")
    with EmulatorServer(failing) as broken, openai.OpenAI(base_url=f"{broken.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5, stream=True))
