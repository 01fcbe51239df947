import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import jsonschema
import numpy as np
import pytest

import scripted_engine
from fault_proxy import KINDS, FaultServer
from tiny import tiny_model
from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.engine import Engine
from uld_adapters.emulator.sampling import Sampler, Warp, top
from uld_adapters.errors import UnknownName, UsageError

SHARED = Path(os.environ.get("ULD_SHARED", Path(__file__).parents[2].parent / "shared")) / "servers"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded answers are not beside the repository")
PROMPT = "The lighthouse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder)


@pytest.fixture(scope="module")
def tgi(engine):
    with EmulatorServer(build_app(engine)) as server:
        yield server


@pytest.fixture(scope="module")
def vllm(engine):
    with EmulatorServer(build_app(engine, dialect="vllm", model_id="tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def http():
    with httpx.Client(timeout=30) as client:
        yield client


def events(text):
    return [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:") and line != "data: [DONE]"]


def generate(http, url, *, inputs=PROMPT, **parameters):
    return http.post(url + "/generate", json={"inputs": inputs, "parameters": {"details": True, **parameters}})


def complete(http, url, **body):
    return http.post(url + "/v1/completions", json={"model": "tiny", "prompt": [289, 224, 380], "temperature": 0, **body})


def slow_reference(engine, ids, n):
    """Greedy tokens and log-probabilities, everything computed anew for each token."""
    import torch

    ids, rows = list(ids), []
    for _ in range(n):
        with torch.inference_mode():
            rows.append(engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).numpy())
        ids.append(int(rows[-1].argmax()))
    return ids[-n:], rows


def scripted(engine, *tokens, prompt=PROMPT, dialect="tgi", **options):
    return scripted_engine.scripted(engine, *tokens, prompt=len(engine.tokenizer.encode(prompt)), dialect=dialect, **options)


def pieces(engine, text):
    return engine.tokenizer.encode(text, add_special_tokens=False)


# --- the package


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, uld_adapters.emulator; print([m for m in ('torch', 'starlette', 'uvicorn', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_dialect_names_the_known_ones(engine):
    with pytest.raises(UnknownName, match="openai, tgi, vllm"):
        build_app(engine, dialect="tgl")


def test_a_taken_port_is_said_plainly(tgi, engine):
    port = int(tgi.url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match="cannot listen"):
        EmulatorServer(build_app(engine), port=port).start()


def test_a_stopped_server_answers_no_more(engine, http):
    with EmulatorServer(build_app(engine)) as server:
        assert http.get(server.url + "/health").status_code == 200
    with pytest.raises(httpx.ConnectError):
        http.get(server.url + "/health")


def test_serve_runs_until_it_is_interrupted(folder):
    code = (
        "import os, signal, sys, urllib.request\n"
        "from uld_adapters.emulator import serve\n"
        "def ready(url):\n"
        "    print(url, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        f"serve({str(folder)!r}, dialect='vllm', port=0, on_ready=ready)\n"
        "print('stopped')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("http://127.0.0.1:"), done.stderr
    assert done.stdout.strip().endswith("stopped"), done.stderr


# --- sampling


def test_greedy_takes_the_lowest_id_of_equals():
    assert Sampler(None)(np.log(np.array([0.2, 0.4, 0.4], dtype=np.float32))) == 1


def test_top_with_ties_gives_more_than_asked_for():
    row = np.log(np.array([0.1, 0.3, 0.3, 0.3], dtype=np.float32))
    assert top(row, 2).tolist() == [1, 2]
    assert top(row, 2, ties=True).tolist() == [1, 2, 3]
    assert top(row, 9).tolist() == [1, 2, 3, 0]
    assert top(row, 0).size == 0


def test_warps_mask_and_renormalise():
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert np.exp(Warp(top_k=2)(row)) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-6)
    assert np.exp(Warp(top_p=0.75)(row)) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-6)
    assert np.exp(Warp(min_p=0.2)(row)) == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=1e-6)
    assert np.exp(Warp(temperature=0.5)(row)) == pytest.approx(np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, abs=1e-6)
    assert Warp(bias={3: 100.0})(row).argmax() == 3
    assert Warp()(row) is row


def test_sampling_follows_the_distribution():
    row, sampler = np.log(np.array([0.5, 0.3, 0.2, 1e-30], dtype=np.float32)), Sampler(7)
    counts = np.bincount([sampler(row) for _ in range(4000)], minlength=4)
    assert counts / 4000 == pytest.approx([0.5, 0.3, 0.2, 0], abs=0.04)


# --- TGI


def test_tgi_reports_what_the_model_says(tgi, engine, http):
    ids = engine.tokenizer.encode(PROMPT)
    tokens, rows = slow_reference(engine, ids, 8)
    details = generate(http, tgi.url, do_sample=False, max_new_tokens=8, top_n_tokens=5).json()["details"]
    assert [t["id"] for t in details["tokens"]] == tokens
    assert details["prefill"] == []
    assert details["seed"] is None
    for row, token, entries in zip(rows, details["tokens"], details["top_tokens"], strict=True):
        assert token["logprob"] == pytest.approx(float(row[token["id"]]), abs=1e-5)
        assert [e["id"] for e in entries] == np.argsort(-row, kind="stable")[:5].tolist()
        assert [e["logprob"] for e in entries] == pytest.approx(np.sort(row)[::-1][:5].tolist(), abs=1e-5)


def test_tgi_streams_the_same_answer(tgi, http):
    parameters = {"do_sample": False, "max_new_tokens": 6, "top_n_tokens": 2, "details": True}
    whole = generate(http, tgi.url, **parameters).json()
    answer = http.post(tgi.url + "/generate_stream", json={"inputs": PROMPT, "parameters": parameters})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith('data:{"index"') for line in answer.text.splitlines() if line)
    streamed = events(answer.text)
    assert [e["index"] for e in streamed] == [1, 2, 3, 4, 5, 6]
    assert [e["token"] for e in streamed] == whole["details"]["tokens"]
    assert [e["top_tokens"] for e in streamed] == whole["details"]["top_tokens"]
    assert all(e["generated_text"] is None and e["details"] is None for e in streamed[:-1])
    assert streamed[-1]["generated_text"] == whole["generated_text"]
    assert streamed[-1]["details"] == {"finish_reason": "length", "generated_tokens": 6, "seed": None, "input_length": 6}


@needs_shared
def test_tgi_answers_fit_the_published_schema(tgi, http):
    published = json.loads((SHARED / "tgi_openapi.json").read_text(encoding="utf-8"))

    def nullable(node):
        if isinstance(node, list):
            return [nullable(item) for item in node]
        if not isinstance(node, dict):
            return node
        # OpenAPI 3.0 writes exclusive bounds and null in its own way.
        kept = {k: nullable(v) for k, v in node.items() if k not in ("nullable", "exclusiveMinimum", "example", "default", "format")}
        return {"anyOf": [kept, {"type": "null"}]} if node.get("nullable") is True else kept

    definitions = nullable(published["components"])

    def fits(data, name):
        schema = {"$ref": f"#/components/schemas/{name}", "components": definitions}
        jsonschema.Draft202012Validator(schema).validate(data)

    parameters = {"max_new_tokens": 4, "top_n_tokens": 3, "details": True}
    for extra in ({"do_sample": False}, {"do_sample": True, "top_k": 2}, {"do_sample": False, "top_n_tokens": 0}, {"details": False}):
        body = {"inputs": PROMPT, "parameters": parameters | extra}
        fits(http.post(tgi.url + "/generate", json=body).json(), "GenerateResponse")
        for item in events(http.post(tgi.url + "/generate_stream", json=body).text):
            fits(item, "StreamResponse")
        for item in http.post(tgi.url + "/", json=body).json():
            fits(item, "GenerateResponse")
    fits(http.get(tgi.url + "/info").json(), "Info")
    fits(http.post(tgi.url + "/tokenize", json={"inputs": PROMPT}).json(), "TokenizeResponse")
    fits(http.get(tgi.url + "/v1/models").json()["data"][0], "ModelInfo")
    refused = generate(http, tgi.url, top_n_tokens=99)
    assert refused.status_code == 422
    fits(refused.json(), "ErrorResponse")
    with pytest.raises(jsonschema.ValidationError):
        fits({"index": 1}, "StreamResponse")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"top_n_tokens": 20}, "`top_n_tokens` must be >= 0 and <= 5. Given: 20"),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not allowed for this endpoint"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 511. Given: 0"),
        (
            {"max_new_tokens": 510},
            "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 6 `inputs` tokens and 510 `max_new_tokens`",
        ),
    ],
)
def test_tgi_refuses_in_its_own_words(tgi, http, parameters, text):
    answer = generate(http, tgi.url, **parameters)
    assert answer.status_code == 422
    assert answer.json() == {"error": f"Input validation error: {text}", "error_type": "validation"}


def test_tgi_reports_a_refusal_inside_the_stream(tgi, http):
    answer = http.post(tgi.url + "/generate_stream", json={"inputs": PROMPT, "parameters": {"top_n_tokens": 20}})
    assert answer.status_code == 200
    assert events(answer.text)[0]["error_type"] == "validation"


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ('{"inputs":[1,2]}', 422, "target type: inputs: invalid type: sequence, expected a string at line 1 column 10"),
        ('{"inputs":7}', 422, "inputs: invalid type: integer `7`, expected a string"),
        ("{}", 422, "missing field `inputs` at line 1 column 2"),
        ('{"inputs":"a","parameters":{"top_n_tokens":-1}}', 422, "parameters.top_n_tokens: invalid value: integer `-1`"),
        ('{"inputs":', 400, "Failed to parse the request body as JSON"),
    ],
)
def test_tgi_takes_text_only(tgi, http, body, status, text):
    answer = http.post(tgi.url + "/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert text in answer.text
    assert answer.headers["content-type"].startswith("text/plain")


def test_tgi_wants_json_said_in_the_header(tgi, http):
    assert http.post(tgi.url + "/generate", content='{"inputs":"a"}').status_code == 415


def test_tgi_refuses_an_empty_text(tgi, http):
    assert generate(http, tgi.url, inputs="").json()["error"] == "Input validation error: `inputs` cannot be empty"


def test_tgi_samples_when_there_are_no_parameters(tgi, http):
    first = events(http.post(tgi.url + "/generate_stream", json={"inputs": PROMPT}).text)
    second = events(http.post(tgi.url + "/generate_stream", json={"inputs": PROMPT}).text)
    assert [e["token"]["id"] for e in first] != [e["token"]["id"] for e in second]
    assert len(first) > 1
    assert generate(http, tgi.url, max_new_tokens=1).json()["details"]["seed"] is None  # parameters without do_sample are greedy


def test_tgi_reports_log_probabilities_after_the_sampling_options(tgi, engine, http):
    row = slow_reference(engine, engine.tokenizer.encode(PROMPT), 1)[1][0].astype(np.float64)
    answer = generate(http, tgi.url, do_sample=True, temperature=0.5, top_k=3, seed=11, max_new_tokens=1, top_n_tokens=5).json()
    entries = answer["details"]["top_tokens"][0]
    best = np.argsort(-row)[:3]
    expected = row[best] / 0.5 - np.log(np.exp(row[best] / 0.5).sum())
    assert [e["id"] for e in entries[:3]] == best.tolist()
    assert [e["logprob"] for e in entries[:3]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [e["logprob"] for e in entries[3:]] == [None, None]
    assert answer["details"]["seed"] == 11


def test_tgi_samples_reproducibly_and_temperature_alone_means_sampling(tgi, http):
    options = {"temperature": 1.5, "max_new_tokens": 12}
    one, two, other = (generate(http, tgi.url, seed=s, **options).json() for s in (5, 5, 6))
    assert one == two
    assert one["generated_text"] != other["generated_text"]


def test_a_server_may_have_a_seed_of_its_own(engine, http):
    with EmulatorServer(build_app(engine, seed=9)) as server:
        own, again, named = (generate(http, server.url, do_sample=True, max_new_tokens=8, **s).json() for s in ({}, {}, {"seed": 9}))
        assert own == again == named
    with EmulatorServer(build_app(engine, dialect="vllm", model_id="tiny", seed=9)) as server:
        body = {"max_tokens": 8, "temperature": 1.0, "return_token_ids": True}
        ids = [complete(http, server.url, **(body | s)).json()["choices"][0]["token_ids"] for s in ({}, {}, {"seed": 9}, {"seed": 8})]
        assert ids[0] == ids[1] == ids[2] != ids[3]


def test_tgi_gives_all_tied_tokens(engine, folder, http):
    blank = Engine.load(folder)
    blank.model.lm_head.weight.data.zero_()
    with EmulatorServer(build_app(blank)) as server, EmulatorServer(build_app(blank, dialect="vllm", model_id="tiny")) as other:
        details = generate(http, server.url, max_new_tokens=2, top_n_tokens=2).json()["details"]
        assert [t["id"] for t in details["tokens"]] == [0, 0]
        assert [len(entries) for entries in details["top_tokens"]] == [blank.rows] * 2
        choice = complete(http, other.url, max_tokens=1, logprobs=2, return_tokens_as_token_ids=True).json()["choices"][0]
        assert list(choice["logprobs"]["top_logprobs"][0]) == ["token_id:0", "token_id:1"]


def test_tgi_always_adds_the_bos_token(tmp_path, http):
    folder = tiny_model(tmp_path / "bos", bos=True)
    with EmulatorServer(build_app(folder)) as server:
        tokens = http.post(server.url + "/tokenize", json={"inputs": "The"}).json()
        assert tokens == [{"id": 0, "text": "", "start": 0, "stop": 0}, {"id": tokens[1]["id"], "text": "The", "start": 0, "stop": 3}]
        body = {"inputs": "<|bos|>The", "parameters": {"max_new_tokens": 1, "details": True}}
        last = events(http.post(server.url + "/generate_stream", json=body).text)[-1]
        assert last["details"]["input_length"] == 3  # the one in the text is not counted once


def test_tgi_ends_with_the_end_token(engine, http):
    word = pieces(engine, " stone")
    with scripted(engine, *word, 1, 5) as server:
        details = generate(http, server.url, max_new_tokens=20).json()
        assert details["generated_text"] == " stone"
        assert details["details"]["finish_reason"] == "eos_token"
        assert details["details"]["tokens"][-1] == {"id": 1, "text": "<|eos|>", "logprob": pytest.approx(np.log(0.9)), "special": True}
        at_the_limit = generate(http, server.url, max_new_tokens=len(word) + 1).json()
        assert at_the_limit["details"]["finish_reason"] == "length"
        stopped = generate(http, server.url, max_new_tokens=20, stop=["one"]).json()
        assert (stopped["generated_text"], stopped["details"]["finish_reason"]) == (" stone", "stop_sequence")
        full = http.post(server.url + "/", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 20}}).json()
        assert full == [{"generated_text": PROMPT + " stone"}]


def test_tgi_holds_text_back_until_a_character_is_complete(engine, http):
    snow = pieces(engine, "東")
    assert len(snow) == 3
    with scripted(engine, *snow, *snow) as server:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3, "details": True}}
        streamed = events(http.post(server.url + "/generate_stream", json=body).text)
        assert [e["token"]["text"] for e in streamed] == ["", "", "東"]
        assert streamed[-1]["generated_text"] == "東"
        assert generate(http, server.url, max_new_tokens=4).json()["generated_text"] == ""  # ends inside a character


def test_tgi_reports_a_failing_model(engine, http):
    class Failing(Engine):
        async def next(self, session):
            if len(session.ids) > 7:
                raise RuntimeError("out of memory")
            return await super().next(session)

    with EmulatorServer(build_app(Failing(engine.model, engine.tokenizer))) as server:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 5}}
        streamed = events(http.post(server.url + "/generate_stream", json=body).text)
        assert [e.get("index") for e in streamed] == [1, 2, None]
        assert streamed[-1] == {"error": "Request failed during generation: out of memory", "error_type": "generation"}
        answer = http.post(server.url + "/generate", json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")


# --- vLLM


def shape(value):
    """Names and types; keys that are tokens or ids count as one."""
    if isinstance(value, dict):
        if value and all(k.isdecimal() or k.startswith("token_id:") for k in value):
            return {"<id>": shape(next(iter(value.values())))}
        return {key: shape(item) for key, item in value.items() if key != "decoded_token"}
    if isinstance(value, list):
        return [shape(item) for item in value[-1:]]
    return type(value).__name__


@needs_shared
@pytest.mark.parametrize(
    "name", ["completions_ids", "echo0", "prompt_logprobs", "logit_bias", "err_oov", "tokenize", "detokenize", "completions_stream"]
)
def test_vllm_answers_have_the_recorded_shape(vllm, http, name):
    recorded = json.loads((SHARED / "recorded" / f"vllm_{name}.json").read_text(encoding="utf-8"))
    request = dict(recorded["request"])
    for key in ("prompt", "tokens"):
        if isinstance(request.get(key), list):
            request[key] = [token if token >= 99999 else token % 400 for token in request[key]]
    answer = http.post(vllm.url + recorded["path"], json=request)
    assert answer.status_code == recorded["status"]
    if "body_text" not in recorded:
        assert shape(answer.json()) == shape(recorded["response"])
        return
    assert answer.text.endswith("data: [DONE]\n\n")
    ours, theirs = events(answer.text), events(recorded["body_text"])
    assert [shape(e) for e in ours] == [shape(e) for e in theirs]
    assert [list(e) for e in ours] == [list(e) for e in theirs]


@needs_shared
def test_vllm_counts_offsets_and_entries_as_recorded(vllm, http):
    recorded = json.loads((SHARED / "recorded" / "vllm_logit_bias.json").read_text(encoding="utf-8"))
    request = recorded["request"] | {"prompt": [289, 224, 380]}
    ours = http.post(vllm.url + "/v1/completions", json=request).json()["choices"][0]
    theirs = recorded["response"]["choices"][0]
    assert ours["text"] == "$$$$"  # the token 7 of this vocabulary
    assert ours["logprobs"]["text_offset"] == theirs["logprobs"]["text_offset"]
    assert [len(e) for e in ours["logprobs"]["top_logprobs"]] == [len(e) for e in theirs["logprobs"]["top_logprobs"]] == [4] * 4
    assert [next(iter(e)) for e in ours["logprobs"]["top_logprobs"]] == ["token_id:7"] * 4


def test_vllm_reports_raw_log_probabilities(vllm, engine, http):
    rows = slow_reference(engine, [289, 224, 380], 1)[1]
    body = {"max_tokens": 1, "logprobs": 4, "return_tokens_as_token_ids": True, "seed": 3}
    for sampling in ({}, {"temperature": 2.0}, {"temperature": 0.7, "top_p": 0.5, "top_k": 2, "min_p": 0.1}):
        report = complete(http, vllm.url, **(body | sampling)).json()["choices"][0]["logprobs"]
        entries = {int(k.removeprefix("token_id:")): v for k, v in report["top_logprobs"][0].items()}
        assert set(np.argsort(-rows[0])[:4].tolist()) <= set(entries)
        assert len(entries) in (4, 5)
        for token, value in entries.items():
            assert value == pytest.approx(float(rows[0][token]), abs=1e-5)


def test_vllm_streams_what_it_answers(vllm, http):
    body = {"max_tokens": 9, "logprobs": 3, "return_tokens_as_token_ids": True, "return_token_ids": True}
    for sampling in ({}, {"temperature": 1.0, "seed": 4}):
        whole = complete(http, vllm.url, **(body | sampling)).json()["choices"][0]
        answer = complete(http, vllm.url, stream=True, **(body | sampling))
        choices = [e["choices"][0] for e in events(answer.text)]
        assert "".join(c["text"] for c in choices) == whole["text"]
        assert [t for c in choices for t in c["token_ids"]] == whole["token_ids"]
        for key, values in whole["logprobs"].items():
            assert [v for c in choices for v in c["logprobs"][key]] == values
        assert [c["finish_reason"] for c in choices] == [None] * 8 + ["length"]


def test_vllm_text_mode_names_tokens_by_their_text(vllm, engine, http):
    body = {"max_tokens": 30, "logprobs": 20, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    report = complete(http, vllm.url, **body).json()["choices"][0]["logprobs"]
    assert report["text_offset"] == [0, *np.cumsum([len(t) for t in report["tokens"]])[:-1].tolist()]
    assert min(len(entries) for entries in report["top_logprobs"]) < 20  # several tokens share one text


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        ({"logprobs": 21}, 400, "Requested sample logprobs of 21, which is greater than max allowed: 20", "logprobs"),
        ({"logprobs": -1}, 400, "Requested sample logprobs of 400, which is greater than max allowed: 20", "logprobs"),
        ({"prompt_logprobs": 21}, 400, "Requested prompt logprobs of 21, which is greater than max allowed: 20", "prompt_logprobs"),
        ({"model": "other"}, 404, "The model `other` does not exist.", "model"),
        ({"prompt": [0, 99999]}, 400, "Token id 99999 is out of vocabulary", None),
        ({"prompt": [0, -1]}, 400, "Token id -1 is out of vocabulary", None),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1, got 0.", "max_tokens"),
        ({"temperature": -1}, 400, "temperature must be non-negative, got -1.0.", "temperature"),
        ({"top_p": 0}, 400, "top_p must be in (0, 1], got 0.0.", "top_p"),
        (
            {"logit_bias": {"400": 1}},
            400,
            "token_id(s) [400] in logit_bias contain out-of-vocab token ids. Vocabulary size: 400",
            "logit_bias",
        ),
        ({"stream": True, "prompt_logprobs": 1}, 400, "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs"),
        (
            {"max_tokens": 510},
            400,
            "This model's maximum context length is 512 tokens. However, you requested 510 output tokens and your prompt contains at least"
            " 3 input tokens, for a total of at least 513 tokens. Please reduce the length of the input prompt or the number of requested"
            " output tokens.",
            "input_tokens",
        ),
    ],
)
def test_vllm_refuses_in_its_own_words(vllm, http, body, status, message, param):
    for stream in (False, True):
        if message.startswith("`prompt_logprobs`") and not stream:
            continue
        answer = complete(http, vllm.url, **({k: v for k, v in body.items() if k != "stream"} | {"stream": stream}))
        kind = "NotFoundError" if status == 404 else "BadRequestError"
        assert answer.status_code == status
        assert answer.json() == {"error": {"message": message, "type": kind, "param": param, "code": status}}


def test_vllm_without_a_cap_gives_the_whole_vocabulary(engine, http):
    with EmulatorServer(build_app(engine, dialect="vllm", model_id="tiny", max_logprobs=-1)) as server:
        report = complete(http, server.url, max_tokens=1, logprobs=-1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
        assert len(report["top_logprobs"][0]) == engine.rows
        assert np.exp(list(report["top_logprobs"][0].values())).sum() == pytest.approx(1.0, abs=1e-4)


def test_vllm_scores_a_prompt(vllm, engine, http):
    ids = engine.tokenizer.encode("The river runs")
    answer = complete(http, vllm.url, prompt=ids, max_tokens=0, echo=True, logprobs=3, return_tokens_as_token_ids=True).json()
    choice = answer["choices"][0]
    assert choice["text"] == "The river runs"
    assert choice["prompt_logprobs"][0] is None
    for i in range(1, len(ids)):
        row = slow_reference(engine, ids[:i], 1)[1][0]
        cell = choice["prompt_logprobs"][i][str(ids[i])]
        assert cell["logprob"] == pytest.approx(float(row[ids[i]]), abs=1e-5)
        assert cell["rank"] == int((row > row[ids[i]]).sum()) + 1
        assert choice["logprobs"]["token_logprobs"][i] == cell["logprob"]
    with_answer = complete(http, vllm.url, prompt=ids, max_tokens=2, echo=True, logprobs=3).json()["choices"][0]
    assert len(with_answer["logprobs"]["tokens"]) == len(ids) + 2


def test_vllm_ends_with_the_end_token(engine, http):
    word = pieces(engine, " stone")
    with scripted(engine, *word, 1, *word, dialect="vllm") as server:
        body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20, "logprobs": 1, "return_token_ids": True}
        choice = http.post(server.url + "/v1/completions", json=body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" stone", "stop", None)
        assert choice["token_ids"] == [*word, 1]
        assert choice["logprobs"]["tokens"][-1] == "<|eos|>"
        last = events(http.post(server.url + "/v1/completions", json=body | {"stream": True}).text)[-1]["choices"][0]
        assert (last["text"], last["token_ids"], last["finish_reason"]) == ("", [1], "stop")
        on = http.post(server.url + "/v1/completions", json=body | {"ignore_eos": True, "max_tokens": 2 * len(word) + 1})
        assert on.json()["choices"][0]["text"] == " stone stone"
        stopped = http.post(server.url + "/v1/completions", json=body | {"stop": "on"}).json()["choices"][0]
        assert (stopped["text"], stopped["stop_reason"]) == (" st", "on")
        streamed = events(http.post(server.url + "/v1/completions", json=body | {"stop": ["on"], "stream": True}).text)
        assert "".join(e["choices"][0]["text"] for e in streamed) == " st"


def test_vllm_spills_the_prompts_open_character_into_the_text(engine, http):
    snow = pieces(engine, "東")
    prompt = [*pieces(engine, "R"), *snow[:2]]
    with scripted_engine.scripted(engine, snow[2], *pieces(engine, "x"), prompt=len(prompt), dialect="vllm") as server:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 2, "logprobs": 1}
        choice = http.post(server.url + "/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == "R東x"
    assert choice["logprobs"]["tokens"] == ["", "x"]


def test_vllm_tokenizes_and_says_what_it_is(vllm, engine, http):
    answer = http.post(vllm.url + "/tokenize", json={"model": "tiny", "prompt": PROMPT}).json()
    assert answer == {"count": 6, "max_model_len": 512, "tokens": engine.tokenizer.encode(PROMPT), "token_strs": None}
    chat = http.post(vllm.url + "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    assert engine.tokenizer.decode(chat) == "<|user|>hi<|assistant|>"
    assert http.post(vllm.url + "/detokenize", json={"tokens": chat}).json() == {"prompt": "<|user|>hi<|assistant|>"}
    model = http.get(vllm.url + "/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", 512)
    assert http.get(vllm.url + "/version").json() == {"version": "0.32.0"}
    assert http.get(vllm.url + "/health").content == b""
    assert http.post(vllm.url + "/tokenize", json={"model": "other", "prompt": "a"}).status_code == 404
    assert http.post(vllm.url + "/v1/completions", content="{").status_code == 400


# --- both


def test_a_repeated_request_needs_no_model(folder, http):
    engine = Engine.load(folder)
    with EmulatorServer(build_app(engine)) as server:
        first = generate(http, server.url, max_new_tokens=6, top_n_tokens=5).json()
        passes = engine.passes
        assert passes == 6
        assert generate(http, server.url, max_new_tokens=6, top_n_tokens=5).json() == first
        generate(http, server.url, max_new_tokens=3, do_sample=True, seed=1, top_k=1)
        assert engine.passes == passes
        longer = generate(http, server.url, max_new_tokens=8, top_n_tokens=5).json()
        assert engine.passes == passes + 2  # the remembered positions are caught up with in one pass
        assert longer["details"]["tokens"][:6] == first["details"]["tokens"]
    forgetful = Engine.load(folder, memo=False)
    with EmulatorServer(build_app(forgetful)) as server:
        for _ in range(2):
            again = generate(http, server.url, max_new_tokens=6).json()
        assert forgetful.passes == 12
        assert again["generated_text"] == first["generated_text"]


def test_the_memo_is_bounded(engine):
    small = Engine(engine.model, engine.tokenizer, memo_bytes=3 * 4 * engine.rows)
    app = build_app(small)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://emulator") as client:
            body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 5}}
            return [(await client.post("/generate", json=body)).json()["generated_text"] for _ in range(2)]

    one, two = asyncio.run(ask())
    assert one == two
    assert len(small._memo) == 3
    assert app.state.stats.requests == 2
    assert app.state.stats.tokens == 10


async def test_requests_at_the_same_time_do_not_mix(engine):
    forgetful = Engine(engine.model, engine.tokenizer, memo=False)
    prompts = ["The river", "A quick brown", "Who wrote", "In the morning"]
    with EmulatorServer(build_app(forgetful)) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(prompt):
                body = {"inputs": prompt, "parameters": {"max_new_tokens": 10, "details": True}}
                return [t["id"] for t in (await client.post("/generate", json=body)).json()["details"]["tokens"]]

            together = await asyncio.gather(*(ask(p) for p in prompts))
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tokens == slow_reference(engine, engine.tokenizer.encode(prompt), 10)[0]


LONG = {
    "tgi": {"inputs": PROMPT, "parameters": {"max_new_tokens": 400}},
    "vllm": {"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True},
    "openai": {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True},
}


@pytest.mark.parametrize("dialect", ["tgi", "vllm", "openai"])
async def test_a_client_that_leaves_stops_the_work(engine, dialect):
    app = build_app(engine, dialect=dialect, model_id="tiny", seconds_per_token=0.02)
    with EmulatorServer(app) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            path, body = "/generate_stream" if dialect == "tgi" else "/v1/completions", LONG[dialect]
            async with client.stream("POST", path, json=body) as answer:
                async for line in answer.aiter_lines():
                    if line:
                        break
            path, body = ("/generate", body) if dialect == "tgi" else (path, body | {"stream": False})
            with pytest.raises(httpx.ReadTimeout):
                await client.post(path, json=body, timeout=0.2)
        await asyncio.sleep(0.3)
        stats = app.state.stats
        assert (stats.requests, stats.cancelled) == (2, 2)
        seen = stats.tokens
        assert 0 < seen < 100
        await asyncio.sleep(0.1)
        assert stats.tokens == seen


def test_finished_requests_do_not_count_as_cancelled(engine, http):
    app = build_app(engine)
    with EmulatorServer(app) as server:
        for path in ("/generate", "/generate_stream"):
            http.post(server.url + path, json={"inputs": PROMPT, "parameters": {"max_new_tokens": 3}})
    assert (app.state.stats.requests, app.state.stats.tokens, app.state.stats.cancelled) == (2, 6, 0)


def test_the_latency_model_keeps_its_deadlines(engine):
    n, trip, each = 10, 0.05, 0.02
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": n}}
    with httpx.Client() as client, EmulatorServer(build_app(engine, round_trip=trip, seconds_per_token=each)) as server:
        client.post(server.url + "/generate", json=body)  # into the memo
        start = time.perf_counter()
        client.get(server.url + "/info")
        assert trip <= time.perf_counter() - start < trip + 0.1
        start, arrivals = time.perf_counter(), []
        with client.stream("POST", server.url + "/generate_stream", json=body) as answer:
            first_byte = time.perf_counter() - start
            for line in answer.iter_lines():
                if line:
                    arrivals.append(time.perf_counter() - start)
        assert first_byte >= trip
        due = [trip + (i + 1) * each for i in range(n)]
        late = np.array(arrivals) - np.array(due)
        assert late.min() > -0.002
        assert np.median(late) < 0.03
        start = time.perf_counter()
        client.post(server.url + "/generate", json=body)
        assert trip + n * each - 0.002 < time.perf_counter() - start < trip + n * each + 0.2


def test_a_key_is_asked_for(engine, http):
    with EmulatorServer(build_app(engine, api_key="secret")) as server:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}
        assert http.post(server.url + "/generate", json=body).status_code == 401
        assert http.post(server.url + "/generate", json=body, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert http.post(server.url + "/generate", json=body, headers={"authorization": "Bearer secret"}).status_code == 200
        assert http.get(server.url + "/info").status_code == 200
    with EmulatorServer(build_app(engine, dialect="vllm", api_key="secret")) as server:
        answer = http.get(server.url + "/v1/models")
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
        assert http.get(server.url + "/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert http.post(server.url + "/tokenize", json={"prompt": "a"}).status_code == 200


def test_a_server_may_ignore_the_wish_for_log_probabilities(engine, http):
    with EmulatorServer(build_app(engine, logprobs=False)) as server:
        details = generate(http, server.url, max_new_tokens=2, top_n_tokens=5).json()["details"]
        assert "top_tokens" not in details
        assert [t["logprob"] for t in details["tokens"]] == [None, None]
    with EmulatorServer(build_app(engine, dialect="vllm", model_id="tiny", logprobs=False)) as server:
        answer = complete(http, server.url, max_tokens=2, logprobs=5)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["logprobs"] is None


# --- the fault injector itself


def test_without_faults_the_injector_changes_nothing(engine, tgi, http):
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True, "top_n_tokens": 2}}
    with FaultServer(build_app(engine), probability=0.0) as server:
        for path in ("/generate_stream", "/generate"):
            assert http.post(server.url + path, json=body).text == http.post(tgi.url + path, json=body).text
        assert http.get(server.url + "/info").json() == http.get(tgi.url + "/info").json()
    assert (server.requests, sum(server.faults.values())) == (3, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", ["tgi", "vllm", "openai"])
def test_every_fault_spoils_an_answer(engine, kind, dialect):
    app = build_app(engine, dialect=dialect, model_id="tiny")
    written = {"max_tokens": 4, "temperature": 0, "stream": True, "model": "tiny"}
    asked = {
        "tgi": ("/generate_stream", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True, "top_n_tokens": 2}}),
        "vllm": ("/v1/completions", {"prompt": PROMPT, "logprobs": 2, "return_token_ids": True, **written}),
        "openai": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, **written}),
    }
    path, body = asked[dialect]
    outcomes = set()
    with httpx.Client() as client, FaultServer(app, probability=1.0, kinds=[kind], seed=3) as server:
        for _ in range(8):
            try:
                answer = client.post(server.url + path, json=body)
                outcomes.add((answer.status_code, answer.text.replace(": ", ":")))
            except httpx.TransportError:
                outcomes.add((0, ""))
        server.probability = 0.0
        right = client.post(server.url + path, json=body)
        assert server.faults == {kind: 8}
        if kind in ("busy", "broken"):
            answer_headers = {"retry-after": "0"} if kind == "busy" else {}
            server.probability = 1.0
            spoiled = client.post(server.url + path, json=body)
            assert {k: v for k, v in spoiled.headers.items() if k == "retry-after"} == answer_headers
            assert spoiled.status_code >= 500
    if dialect == "tgi":  # the others' answers carry a random id
        assert any(outcome != (200, right.text.replace(": ", ":")) for outcome in outcomes)
    assert right.status_code == 200


def test_the_injector_is_fast_enough_for_thousands_of_runs(engine, http):
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "details": True, "top_n_tokens": 5}}
    with FaultServer(build_app(engine), probability=0.0) as server:
        http.post(server.url + "/generate_stream", json=body)
        start = time.perf_counter()
        for _ in range(50):
            http.post(server.url + "/generate_stream", json=body)
        assert (time.perf_counter() - start) / 50 < 0.1
