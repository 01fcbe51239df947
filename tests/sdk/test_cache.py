"""The cache command: the target's log-probabilities through every backend, as training will ask for them, and what may go wrong."""

import asyncio
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.backend import Capabilities
from uld_adapters.errors import (
    ArtifactCorrupt,
    DataError,
    LogprobsUnavailable,
    RequestRejected,
    SaveFailed,
    TokenizerMismatch,
    UldError,
    UsageError,
)
from uld_adapters.huggingface import HuggingFaceBackend
from uld_adapters.logprobs import Score
from uld_adapters.vocabulary.tokens import load_tokenizer, tokenizer_fingerprint
from uld_offset_models.data import build_sets, read_rows
from uld_offset_models.encoding import Encoded, encode
from uld_offset_models.refusals import read_refusals, refused
from uld_offset_models.target_cache import TargetCache, template_hash
from uld_sdk.caching.asking import Cost
from uld_sdk.caching.job import cache
from uld_sdk.cli import app
from uld_sdk.templates import TemplateWarning

WIDER = [{**FORGET[0], "paraphrased_question": "How is the river called?", "perturbed_answer": ["It is called the Rhine."]}, *FORGET[1:]]
TEXT = [{"text": "The lighthouse on the northern island was built of grey stone."}]


class Local(HuggingFaceBackend):
    """A local model that counts its texts, can refuse from some text on, and has a name and a way of scoring of the test's choice."""

    def __init__(self, model: Path, *, called: str = "served", scoring: Any = "prompt", fails_after: int | None = None) -> None:
        super().__init__(model=str(model), top_logprobs=7)
        self.called, self.scoring, self.fails_after = called, scoring, fails_after
        self.scored: list[tuple[int, ...]] = []
        self.now = self.most = 0

    async def probe(self) -> Capabilities:
        return Capabilities(self.called, 7, scoring=self.scoring, context=512)

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.001)
            if self.fails_after is not None and len(self.scored) >= self.fails_after:
                raise RequestRejected("enough for today")
            self.scored.append((*prefix, *continuation))
            return await super().score(prefix, continuation)
        finally:
            self.now -= 1


def trained_rows(base: Path, *, refusals: bool = True) -> dict[Encoded, str]:
    """The rows of a training on these sets, encoded as it does."""
    tokenizer = load_tokenizer(str(base))
    sets = build_sets(read_rows([{**WIDER[0], "perturbed_answer": []}, *WIDER[1:]]), read_rows(RETAIN), holdout=0.3, seed=3)
    examples = [*sets.forget, *sets.retain, *sets.holdout]
    if refusals:
        examples += refused(sets.forget, read_refusals("built-in"), seed=3)
    return dict(zip(encode(tokenizer, examples, chat_template=True, max_length=512), [e.place for e in examples], strict=True))


def reference(model: Path, rows: Sequence[Encoded], k: int) -> list[Score]:
    backend = HuggingFaceBackend(model=str(model), top_logprobs=k)

    async def scores() -> list[Score]:
        return [await backend.score(row.prompt, row.answer) for row in rows]

    return asyncio.run(scores())


def test_an_echo_of_completions_says_what_the_model_says(vllm_server: Any, openai_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    """vLLM's own route echoes, the API's does not; neither tells half characters apart, which are then in the mass of the others."""
    words = {"forget": WIDER, "retain": RETAIN, "base": str(tiny_target), "backend": "openai", "route": "completions"}
    tokenizer = load_tokenizer(str(tiny_target))
    example = read_rows(FORGET[:1])[0].example
    (row,) = encode(tokenizer, [example], chat_template=True, max_length=512)
    (expected,) = reference(tiny_target, [row], 400)
    for server, scoring in ((vllm_server, "prompt"), (openai_server, "drafts")):
        result = cache(output=tmp_path / scoring, base_url=server.url, **words)
        assert result.manifest.scoring == scoring
        values = TargetCache.open(tmp_path / scoring).find(row.prompt, row.answer)
        told = ~np.isnan(values.label)
        np.testing.assert_allclose(values.label[told], expected.logprobs[told], atol=2e-3)
        assert told.all() if scoring == "prompt" else told.any()
        for ids, logprobs, top in zip(values.ids, values.logprobs, expected.positions, strict=True):
            np.testing.assert_allclose(logprobs, [top.of(token) for token in ids], atol=2e-3)
        np.testing.assert_allclose(values.tail, 1 - np.exp(values.logprobs).sum(1), atol=2e-3)
        if scoring == "prompt":
            assert result.requests < result.texts + 12, "one request a text, and the first look at the server"


@pytest.mark.parametrize("name", ["hf", "vllm", "llamacpp", "tgi"])
def test_every_backend_says_what_the_model_says(name: str, request: pytest.FixtureRequest, tiny_target: Path, tmp_path: Path) -> None:
    place = {"model": str(tiny_target)} if name == "hf" else {"base_url": request.getfixturevalue(f"{name}_server").url}
    result = cache(
        output=tmp_path / "cache", forget=WIDER, retain=RETAIN, refusals="built-in", seed=3, base=str(tiny_target), backend=name,
        top_logprobs=12, **place,
    )  # fmt: skip
    rows = trained_rows(tiny_target)
    assert (result.texts, result.scored) == (len(rows), len(rows))
    assert result.tokens == sum(len(row.answer) for row in rows)
    tokenizer = load_tokenizer(str(tiny_target))
    found = TargetCache.open(tmp_path / "cache")
    found.check(rows)
    assert found.manifest == result.manifest
    assert found.manifest.tokenizer_sha256 == tokenizer_fingerprint(tokenizer)
    assert found.manifest.template_sha256 == template_hash(tokenizer, chat_template=True)
    assert (found.top_logprobs, found.manifest.scoring) == (12, {"tgi": "drafts", "llamacpp": "forced"}.get(name, "prompt"))
    for row, expected in zip(rows, reference(tiny_target, list(rows), 12), strict=True):
        values = found.find(row.prompt, row.answer)
        np.testing.assert_allclose(values.logprobs, [top.logprobs for top in expected.positions], atol=2e-3)
        np.testing.assert_allclose(values.tail, [top.tail_mass for top in expected.positions], atol=2e-3)
        told = ~np.isnan(values.label)
        np.testing.assert_allclose(values.label[told], expected.logprobs[told], atol=2e-3)
        outside = [token not in ids for token, ids in zip(row.answer, values.ids, strict=True)]
        assert told.all() if name != "tgi" else (~told == outside).all()  # TGI says nothing of what is outside its top k


def test_complete_distributions_can_be_kept(tiny_target: Path, tmp_path: Path) -> None:
    result = cache(output=tmp_path / "cache", data=[TEXT], backend="hf", model=str(tiny_target), top_logprobs=400)
    found = TargetCache.open(tmp_path / "cache")
    assert (result.manifest.top_logprobs, found.top_logprobs) == (None, None)
    (row,) = encode(load_tokenizer(str(tiny_target)), [read_rows(TEXT)[0].example], chat_template=True, max_length=512)
    values = found.find(row.prompt, row.answer)
    np.testing.assert_allclose(np.exp(values.logprobs).sum(1), 1, atol=1e-2)
    np.testing.assert_array_equal(values.ids[0], range(400))


def other_template(model: Path, place: Path, template: str = "{% for m in messages %}Q: {{ m['content'] }} A: {% endfor %}") -> Path:
    shutil.copytree(model, place)
    (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    return place


def test_each_model_reads_the_prompt_by_its_own_template(tiny_target: Path, tmp_path: Path) -> None:
    base = other_template(tiny_target, tmp_path / "base")
    served = Local(tiny_target)
    cache(output=tmp_path / "cache", forget=FORGET[:1], base=str(base), backend=served)
    example = read_rows(FORGET[:1])[0].example
    keyed, asked = (encode(load_tokenizer(str(model)), [example], chat_template=True, max_length=512)[0] for model in (base, tiny_target))
    assert keyed.prompt != asked.prompt
    assert served.scored == [asked.ids]
    found = TargetCache.open(tmp_path / "cache")
    found.find(keyed.prompt, keyed.answer)
    own, theirs = (template_hash(load_tokenizer(str(model)), chat_template=True) for model in (base, tiny_target))
    assert found.manifest.template_sha256 == own != theirs
    ends = other_template(tiny_target, tmp_path / "ends", "{% for m in messages %}{{ m['content'] + '<|user|>' }}{% endfor %}")
    with pytest.raises(UsageError, match=r"row 1: the base ends this answer with <\|user\|>, the target with <\|eos\|>"):
        cache(output=tmp_path / "two", forget=FORGET, base=str(ends), backend=served)


def test_a_base_of_another_vocabulary_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    other = tiny.tiny_model(tmp_path / "other", vocab_size=380)
    with pytest.raises(TokenizerMismatch):
        cache(output=tmp_path / "cache", forget=FORGET, base=str(other), backend=Local(tiny_target))


def test_a_borrowed_template_is_doubted(vllm_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    base = other_template(tiny_target, tmp_path / "base")
    with pytest.warns(TemplateWarning, match="renders messages in another form"):
        cache(output=tmp_path / "cache", forget=FORGET[:1], base=str(base), backend="vllm", base_url=vllm_server.url)


def test_texts_go_to_the_server_some_at_a_time_and_once(tiny_target: Path, tmp_path: Path) -> None:
    served, seen = Local(tiny_target), []
    options: dict[str, Any] = {"output": tmp_path / "cache", "forget": WIDER, "data": [RETAIN, FORGET, TEXT], "backend": served}
    result = cache(**options, concurrency=3, on_progress=lambda done, total: seen.append((done, total)))
    assert served.most == 3
    assert len(set(served.scored)) == len(served.scored) == result.scored == 12
    assert seen == [(done, 12) for done in range(1, 13)]
    again = cache(**options)
    assert (again.scored, again.texts, len(served.scored)) == (0, 12, 12)
    assert again.manifest == result.manifest


@pytest.mark.parametrize("fails_after", [1, 5])
def test_a_run_that_a_server_ended_goes_on(tiny_target: Path, tmp_path: Path, fails_after: int) -> None:
    options: dict[str, Any] = {"output": tmp_path / "cache", "forget": FORGET, "retain": RETAIN}
    with pytest.raises(RequestRejected) as caught:
        cache(**options, backend=Local(tiny_target, fails_after=fails_after), concurrency=1)
    assert caught.value.__notes__ == [f"  {fails_after} of 10 texts are in {tmp_path / 'cache'}: the same command goes on from there"]
    with pytest.raises(UsageError, match=f"is not finished: it holds {fails_after} of 10 rows"):
        TargetCache.open(tmp_path / "cache")
    served = Local(tiny_target)
    assert cache(**options, backend=served).scored == 10 - fails_after
    assert len(served.scored) == 10 - fails_after + 1, "one text is scored again to see whether the server still is the same"
    assert len(TargetCache.open(tmp_path / "cache")) == 10


def test_another_model_behind_the_same_name_is_noticed(tiny_target: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": tmp_path / "cache", "forget": FORGET, "retain": RETAIN}
    with pytest.raises(RequestRejected):
        cache(**options, backend=Local(tiny_target, fails_after=5))
    other = tiny.tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match=r"the server answers otherwise than when the cache was begun: on .* moved by 0\.\d\d"):
        cache(**options, backend=Local(other))


def test_a_cache_of_something_else_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": tmp_path / "cache", "forget": FORGET}
    cache(**options, backend=Local(tiny_target))
    with pytest.raises(UsageError, match="was made for another target: served, not larger"):
        cache(**options, backend=Local(tiny_target, called="larger"))
    with pytest.raises(UsageError, match="was made for another chat template"):
        cache(**options, backend=Local(tiny_target), chat_template=False)
    with pytest.raises(UsageError, match=r"was made for other data: retain differ\n  fix: .*--extend keeps its rows"):
        cache(**options, retain=RETAIN, backend=Local(tiny_target))
    served = Local(tiny_target)
    assert cache(**options, retain=RETAIN, backend=served, extend=True).scored == len(RETAIN)
    assert len(TargetCache.open(tmp_path / "cache")) == len(FORGET) + len(RETAIN)


def test_a_damaged_shard_is_named_and_made_anew(tiny_target: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": tmp_path / "cache", "forget": FORGET, "backend": Local(tiny_target)}
    cache(**options)
    shard = tmp_path / "cache" / "00000.rows"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactCorrupt, match=r"the shard .*00000\.rows is not as it was written"):
        cache(**options)
    shard.unlink()
    assert cache(**options).scored == len(FORGET)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, UsageError, "no text was given\n  fix: add --forget, --retain or --data"),
        ({"retain": RETAIN, "refusals": "built-in"}, UsageError, "there is no forget set\n  fix: add --forget"),
        ({"forget": FORGET, "refusals": "missing.txt"}, DataError, r"the refusals missing\.txt cannot be read"),
        ({"forget": TEXT, "refusals": "built-in"}, DataError, "plain text asks nothing that could be refused"),
        ({"forget": FORGET, "retain": FORGET}, DataError, "the forget set overlaps the retain set in 4 rows"),
        ({"forget": FORGET, "max_length": 8}, DataError, "question and answer take .* tokens, more than the 8 that fit"),
        ({"forget": FORGET, "concurrency": 0}, UsageError, "concurrency is 0"),
        ({"forget": FORGET, "base": "no-such-model-here"}, TokenizerMismatch, "no tokenizer could be loaded"),
    ],
)
def test_what_cannot_be_scored_is_told_before_a_server_is_asked(
    given: dict[str, Any], error: type[Exception], message: str, tiny_target: Path, tmp_path: Path
) -> None:
    served = Local(tiny_target)
    with pytest.raises(error, match=message):
        cache(output=tmp_path / "cache", backend=served, **given)
    assert not served.scored
    assert not (tmp_path / "cache").exists()


def test_an_output_that_cannot_be_written_is_told_before_a_server_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(SaveFailed, match=r"cache could not be written: .*file is no folder") as caught:
        cache(output=tmp_path / "file" / "cache", forget=FORGET, backend="vllm", base_url="http://127.0.0.1:9", tokenizer="missing")
    assert "choose another -o/--output" in caught.value.hint


def test_no_backend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend was named"):
        cache(output=tmp_path / "cache", forget=FORGET)


def test_a_server_that_takes_text_only_must_split_it_like_the_tokenizer(tgi_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    odd = [*FORGET, {"question": "What is that?", "answer": "A smile 😀 and snow ☃."}]
    with pytest.raises(
        RequestRejected, match="tgi takes text only, and splits 1 of 5 texts in its own way: data 1 row 5\n  fix: take these"
    ):
        cache(output=tmp_path / "cache", data=[odd], backend="tgi", base_url=tgi_server.url, tokenizer=str(tiny_target))
    assert not (tmp_path / "cache").exists()


def test_a_server_that_reports_no_log_probabilities(tiny_target: Path, tmp_path: Path) -> None:
    from uld_adapters.emulator import EmulatorServer, build_app

    with (
        EmulatorServer(build_app(tiny_target, dialect="tgi", logprobs=False)) as server,
        pytest.raises(LogprobsUnavailable, match="--max-top-n-tokens"),
    ):
        cache(output=tmp_path / "cache", forget=FORGET, backend="tgi", base_url=server.url, tokenizer=str(tiny_target))


def test_the_cost_is_told_before_most_of_it(tiny_target: Path, tmp_path: Path) -> None:
    served, costs = Local(tiny_target, scoring="drafts"), []

    def no(cost: Cost) -> bool:
        costs.append((cost, len(served.scored)))
        return False

    options: dict[str, Any] = {"output": tmp_path / "cache", "forget": FORGET, "retain": RETAIN}
    with pytest.raises(UldError, match="nothing more is scored, as you wish") as caught:
        cache(**options, backend=served, confirm=no)
    assert caught.value.exit_code == 1
    ((cost, scored),) = costs
    assert (scored, cost.texts, cost.scoring) == (1, 9, "drafts")
    tokenizer = load_tokenizer(str(tiny_target))
    answers = [len(tokenizer.encode(row["answer"], add_special_tokens=False)) + 1 for row in [*FORGET, *RETAIN]]
    assert cost.tokens == sum(answers) - answers[0]
    assert cost.seconds > 0
    assert cache(**options, backend=Local(tiny_target, scoring="drafts"), confirm=lambda cost: True).scored == 9
    prompt = Local(tiny_target)
    cache(output=tmp_path / "other", forget=FORGET, backend=prompt, confirm=no)
    assert len(costs) == 1, "nobody is asked where a text is one request"


def test_requests_are_foreseen_in_proportion(tgi_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    costs: list[Cost] = []
    result = cache(
        output=tmp_path / "cache", retain=RETAIN, forget=FORGET, backend="tgi", base_url=tgi_server.url, tokenizer=str(tiny_target),
        confirm=lambda cost: not costs.append(cost),
    )  # fmt: skip
    (cost,) = costs
    assert result.requests / 3 < cost.requests < result.requests * 3


async def test_it_runs_inside_a_loop(tiny_target: Path, tmp_path: Path) -> None:
    assert cache(output=tmp_path / "cache", forget=FORGET, backend=Local(tiny_target)).scored == len(FORGET)


CLI = [sys.executable, "-m", "uld_sdk.cli", "cache"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    forget, retain = write_rows(tmp_path / "forget.jsonl", FORGET), write_rows(tmp_path / "retain.jsonl", RETAIN)
    return ["--forget", str(forget), "--retain", str(retain), "-o", str(tmp_path / "cache")]


def command(*words: str) -> Any:
    """The command in this process, where no terminal is; the outcome has exit_code, stdout and stderr apart."""
    done = CliRunner().invoke(app, ["cache", *words], prog_name="uld-sdk")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_on_the_command_line(files: list[str], llamacpp_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    server = ["-b", "llamacpp", "-u", llamacpp_server.url, "--tokenizer", str(tiny_target)]
    refused = command(*files, *server)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "the server scores no given text in one request, but some positions a request: 9 more texts of" in refused.stderr
    assert re.search(r"error: \d+ requests need your consent, and this is no terminal to give it on\n  fix: add --yes\n", refused.stderr)
    assert "  1 of 10 texts are in " in refused.stderr
    done = command(*files, *server, "--yes", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["path"], told["texts"], told["scored"], told["top_logprobs"], told["scoring"]) == (
        str(tmp_path / "cache"),
        10,
        9,
        20,
        "forced",
    )
    assert told["requests"] > 0
    assert "requests" in done.stderr
    again = command(*files, *server)
    assert again.exit_code == 0
    assert "0, 10" in again.stdout
    assert again.stderr == ""


def test_a_chat_api_scores_no_given_text(files: list[str], tiny_target: Path) -> None:
    told = command(*files, "-b", "openai", "-u", "http://127.0.0.1:9/v1", "--tokenizer", str(tiny_target))
    assert (told.exit_code, told.stdout) == (2, "")
    assert "error: a chat API scores no given text, and openai asks by messages\n  fix: with openai --route completions" in told.stderr
    assert "or --backend vllm, llamacpp or tgi" in told.stderr
    asked = command(*files, "-b", "vllm", "-u", "http://127.0.0.1:9", "--route", "completions")
    assert asked.exit_code == 2
    assert "route is for servers of the OpenAI kind" in asked.stderr


def test_one_request_a_text_is_not_asked_about(files: list[str], vllm_server: Any, tiny_target: Path) -> None:
    done = command(*files, "-b", "vllm", "-u", vllm_server.url, "--tokenizer", str(tiny_target), "--data", files[1], "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["scored"] == 10


@pytest.fixture
def slow_server(tiny_target: Path) -> Iterator[Any]:
    from uld_adapters.emulator import EmulatorServer, build_app

    with EmulatorServer(build_app(tiny_target, dialect="vllm", round_trip=0.25)) as server:
        yield server


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_scored(files: list[str], slow_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    server = ["-b", "vllm", "-u", slow_server.url, "--tokenizer", str(tiny_target), "-c", "1"]
    process = subprocess.Popen([*CLI, *files, *server], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    shard, deadline = tmp_path / "cache" / "00000.rows", time.monotonic() + 60
    while not shard.exists() or shard.stat().st_size < 1000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.startswith("interrupted\n")
    kept = int(told.split(" of 10 texts are in")[0].split()[-1])
    assert 0 < kept < 10
    done = command(*files, *server, "--json")
    assert json.loads(done.stdout)["scored"] == 10 - kept


def test_a_disk_that_is_full_loses_nothing(files: list[str], vllm_server: Any, tiny_target: Path, tmp_path: Path) -> None:
    server = ["-b", "vllm", "-u", vllm_server.url, "--tokenizer", str(tiny_target), "-c", "1"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    full = subprocess.run([*CLI, *files, *server], capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert (
        "00000.rows could not be written: File too large\n  fix: free some space and run the same command again: it goes on" in full.stderr
    )
    kept = int(full.stderr.split(" of 10 texts are in")[0].split()[-1])
    assert kept > 0
    done = command(*files, *server, "--json")
    assert json.loads(done.stdout)["scored"] == 10 - kept
    assert len(TargetCache.open(tmp_path / "cache")) == 10
