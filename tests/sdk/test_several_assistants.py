"""Several assistants on one client: their sum against a slow reference, and what happens when they come and go."""

import asyncio
import gc
import json
import math
import shutil
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pairs import Whole, save_pair
from reference import Reference
from tiny import lowering, tiny_model
from tiny_rows import FORGET, RETAIN, write_rows
from uld_adapters.errors import ArtifactCorrupt, ArtifactMismatch, TokenizerMismatch, UsageError
from uld_adapters.vocabulary.tokens import end_token_ids
from uld_offset_models.artifact import seal
from uld_offset_models.loading import load_artifact
from uld_offset_models.manifest import read_manifest
from uld_sdk import AsyncUnlearnedClient, UnlearnedClient
from uld_sdk.cli import app
from uld_sdk.prompts import render
from uld_sdk.sampling import gumbel

PROMPTS = ["Who wrote the book about the sea?", "What is the name of the river?", "def area("]
MORE_PROMPTS = [*PROMPTS, *(row["question"] for row in (*RETAIN, *FORGET))]
LENGTH, K = 16, 20


@dataclass(frozen=True)
class Trained:
    """Three artifacts: two on the target's weights, with unlike rules and gates, and one on another base."""

    first: Path
    second: Path
    other: Path

    def rules(self) -> dict[Path, tuple[float, float, float]]:
        found = {path: read_manifest(path) for path in (self.first, self.second, self.other)}
        return {path: (manifest.alpha, manifest.margin, manifest.filter) for path, manifest in found.items()}


@pytest.fixture(scope="module")
def trained(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from uld_sdk.training import train

    folder = tmp_path_factory.mktemp("several")
    base = tiny_model(folder / "other-base", seed=5)

    def made(name: str, base: Path, forget: Any, retain: Any, **rule: float) -> Path:
        run = {"steps": 40, "learning_rate": 0.01, "device": "cpu", "dtype": "float32", "progress": False}
        return train(base=str(base), forget=forget, retain=retain, output=folder / name, **run, **rule).path

    return Trained(
        made("first", tiny_target, FORGET, RETAIN, alpha=1.5, margin=1.0, filter=0.02),
        made("second", tiny_target, RETAIN[:3], FORGET, alpha=0.8, margin=0.6, filter=0.1, rank=4, lora_alpha=8),
        made("other", base, RETAIN[3:], FORGET, alpha=4.0, margin=0.6, filter=0.005),
    )


@dataclass
class PairPart(Reference):
    """A pair in the place of an assistant: the change in the place of the excess."""

    whole: Any = None

    def excess(self, ids: list[int]) -> np.ndarray:
        return self.whole.read(ids)[0][-1]


def _size(part: Reference, values: np.ndarray) -> np.ndarray:
    """What the margin is compared with: a pair moves tokens down and up."""
    return np.abs(values) if isinstance(part, PairPart) else values


class Sum:
    """A slow decode loop over several assistants, each loaded alone; it has the sum by its definition."""

    def __init__(self, target: Path, folders: Sequence[Path], rules: dict[Path, tuple[float, float, float]]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self.ends = end_token_ids(self.tokenizer)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.parts: list[Reference] = []
        for folder in folders:
            alpha, margin, ratio = rules[folder]
            options = {"ends": self.ends, "k": K, "alpha": alpha, "margin": margin, "ratio": ratio}
            if read_manifest(folder).pair is not None:
                self.parts.append(PairPart(model, model, torch.zeros(0), None, **options, whole=Whole(folder, target, "lora", gated=True)))
            else:
                small = load_artifact(folder).small
                self.parts.append(Reference(model, small.backbone, small.head, small.gate, **options))

    def log_q(self, ids: list[int]) -> tuple[dict[int, float], tuple[int, ...]]:
        """Unnormalised log q of what may stand, best report first, and who touches."""
        log_p = self.parts[0].target_logprobs(ids)
        order = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))[:K]
        excesses = [part.excess(ids) for part in self.parts]
        acting = [at for at, part in enumerate(self.parts) if _size(part, excesses[at]).max() > part.margin]
        kept = order
        for at in acting:
            kept = [v for v in kept if log_p[v] >= log_p[order[0]] + math.log(self.parts[at].ratio)]
        score = {v: log_p[v] for v in kept}
        for at in acting:
            part, sign = self.parts[at], 1.0 if isinstance(self.parts[at], PairPart) else -1.0
            moved = part.alpha * sign * np.sign(excesses[at]) * np.maximum(0.0, _size(part, excesses[at]) - part.margin)
            score = {v: value + moved[v] for v, value in score.items()}
        return score, tuple(acting)

    def answer(self, prompt: str, *, seed: int | None = None) -> tuple[list[int], list[int]]:
        """Token ids, and how many positions each assistant touches."""
        ids, answer, counts = render(self.tokenizer, prompt), list[int](), [0] * len(self.parts)
        while len(answer) < LENGTH and not (answer and answer[-1] in self.ends):
            score, acting = self.log_q([*ids, *answer])
            for at in acting:
                counts[at] += 1
            if seed is not None:
                total = np.logaddexp.reduce(list(score.values()))
                noise = gumbel(seed, len(answer), np.arange(max(score) + 1))
                score = {v: value - total + noise[v] for v, value in score.items()}
            answer.append(min(score, key=lambda v: (-score[v], v)))
        return answer, counts


def open_client(server: Any, assistants: Any, **options: Any) -> UnlearnedClient:
    return UnlearnedClient(backend="vllm", base_url=server.url, assistant=assistants, top_logprobs=K, **options)


@pytest.mark.parametrize("names", [("first", "second"), ("first", "other"), ("second", "other", "first")])
@pytest.mark.parametrize("draft", ["stream", 1, 5])
def test_the_answer_is_that_of_the_sum(
    names: tuple[str, ...], draft: str | int, tiny_target: Path, trained: Trained, vllm_server: Any
) -> None:
    folders = [getattr(trained, name) for name in names]
    slow = Sum(tiny_target, folders, trained.rules())
    seen = np.zeros(len(names))
    with open_client(vllm_server, folders, draft=draft) as client:
        for prompt in PROMPTS:
            for seed in (None, 7):
                expected, counts = slow.answer(prompt, seed=seed)
                sampling: dict[str, Any] = {} if seed is None else {"temperature": 1.0, "seed": seed}
                result = client.generate(prompt, max_new_tokens=LENGTH, **sampling)
                assert list(result.token_ids) == expected
                assert list(result.report.touched_by.items()) == list(zip(map(str, folders), counts, strict=True))
                assert result.untouched == (sum(counts) == 0)
                seen += counts
    assert (seen > 0).all(), "each of them had something to say"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_assistant_and_pairs_of_one_base_are_one_batch(
    temperature: float, tiny_target: Path, trained: Trained, vllm_server: Any, tmp_path: Path
) -> None:
    rule = {"alpha": 2.0, "margin": 0.4, "filter": 0.02, "tail": "truncate"}
    pair = save_pair(tmp_path / "pair", tiny_target, "lora", gated=True, **rule)
    rules = {**trained.rules(), pair: (2.0, 0.4, 0.02)}
    slow = Sum(tiny_target, [pair, trained.first], rules)
    seen = np.zeros(2)
    with open_client(vllm_server, [pair, trained.first]) as client:
        for prompt in PROMPTS:
            expected, counts = slow.answer(prompt, seed=7 if temperature else None)
            sampling: dict[str, Any] = {"temperature": temperature, "seed": 7} if temperature else {}
            result = client.generate(prompt, max_new_tokens=LENGTH, **sampling)
            assert list(result.token_ids) == expected
            assert list(result.report.touched_by.values()) == counts
            seen += counts
        client.add_assistant(save_pair(tmp_path / "tuned", tiny_target, "p-adapter", gated=True))
        assert client._client._small is not None
        assert [side.worker for side in client._client._small.sides].count(client._client._small.sides[0].worker) == 2
        assert client.generate(PROMPTS[0], max_new_tokens=4).report.touched_by.keys() >= {str(pair), str(trained.first)}
    assert (seen > 0).all()


def test_a_score_is_that_of_the_sum(tiny_target: Path, trained: Trained, vllm_server: Any) -> None:
    slow = Sum(tiny_target, [trained.first, trained.second], trained.rules())
    text = "It is called the Amber."
    with UnlearnedClient(backend="hf", model=str(tiny_target), assistant=[trained.first, trained.second], top_logprobs=K) as client:
        score = client.score(PROMPTS[1], text)
    ids, touched = render(slow.tokenizer, PROMPTS[1]), 0
    for token, upper in zip(slow.tokenizer.encode(text, add_special_tokens=False), score.upper, strict=True):
        values, acting = slow.log_q(ids)
        touched += bool(acting)
        if acting and token in values:
            assert upper == pytest.approx(values[token] - np.logaddexp.reduce(list(values.values())), abs=1e-3)
        ids = [*ids, token]
    assert touched == len(score.upper) - score.untouched > 0


def test_where_one_touches_the_answer_is_its_own(trained: Trained, vllm_server: Any) -> None:
    """The other is silenced by a margin that nothing exceeds, and then filters nothing either."""
    silent = {"alpha": 5.0, "margin": 50.0, "filter": 0.9}
    quiet = trained.second.with_name("quiet")
    shutil.copytree(trained.second, quiet)
    seal(quiet, read_manifest(quiet).model_copy(update=silent))
    with open_client(vllm_server, trained.first) as one, open_client(vllm_server, [quiet, trained.first]) as both:
        for prompt in PROMPTS:
            alone, joint = (client.generate(prompt, max_new_tokens=LENGTH) for client in (one, both))
            assert joint.token_ids == alone.token_ids
            assert joint.report.touched_by == {str(quiet): 0, **alone.report.touched_by}
            assert joint.report.exact == alone.report.exact


def test_what_the_client_says_holds_for_each(trained: Trained, vllm_server: Any) -> None:
    with open_client(vllm_server, [trained.first, trained.second], margin=50.0) as client:
        assert all(client.generate(prompt, max_new_tokens=8).untouched for prompt in PROMPTS)
    with pytest.raises(UsageError, match=r"alpha is -1\.0"):
        open_client(vllm_server, [trained.first, trained.second], alpha=-1.0)


async def test_one_batch_for_those_of_one_base(trained: Trained, vllm_server: Any) -> None:
    """Each pass reads for both, and those of another base have a thread of their own."""
    async with AsyncUnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=[trained.first, trained.second]) as client:
        await client.capabilities()
        assert client._small is not None
        (worker,) = client._small.workers
        rows: list[int] = []
        worker.scorer.members[0].model.backbone.register_forward_pre_hook(
            lambda *told: rows.append(len(told[2]["input_ids"])), with_kwargs=True
        )
        result = await client.generate(PROMPTS[0], max_new_tokens=LENGTH)
        assert set(rows) == {2}
        assert len(rows) == worker.passes <= result.report.positions + result.report.requests
    three = [trained.first, trained.other, trained.second]
    async with AsyncUnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=three) as client:
        await client.capabilities()
        assert client._small is not None
        assert len(client._small.workers) == 2
        assert [side.begin().member for side in client._small.sides] == [0, 0, 1]


def test_many_at_once_are_each_as_if_alone(trained: Trained, vllm_server: Any) -> None:
    with open_client(vllm_server, [trained.first, trained.other, trained.second]) as client:
        single = [client.generate(prompt, max_new_tokens=LENGTH).token_ids for prompt in PROMPTS]
        many = client.generate_many(PROMPTS * 3, max_new_tokens=LENGTH, concurrency=6)
    assert [result.token_ids for result in many] == single * 3


async def test_they_come_and_go_while_answers_are_under_way(tiny_target: Path, trained: Trained, vllm_server: Any) -> None:
    sets = ((trained.first,), (trained.first, trained.second), (trained.second,), (trained.second, trained.other))
    slow = {folders: Sum(tiny_target, folders, trained.rules()) for folders in sets}
    answers = ((prompt, {folders: one.answer(prompt)[0] for folders, one in slow.items()}) for prompt in MORE_PROMPTS)
    prompt, expected = next(found for found in answers if len({tuple(found[1][folders]) for folders in sets[:3]}) == 3)

    async def rest(pieces: Any) -> list[int]:
        return [token async for piece in pieces for token in piece.token_ids]

    async with AsyncUnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=trained.first, draft=2) as client:

        def begin() -> Any:
            return client.stream(prompt, max_new_tokens=LENGTH)

        first = begin()
        tokens = list((await anext(first)).token_ids)
        await client.add_assistant(trained.second)
        assert client.assistants == (trained.first, trained.second)
        second = begin()
        others = list((await anext(second)).token_ids)
        await client.remove_assistant(str(trained.first))
        assert client.assistants == (trained.second,)
        assert tokens + await rest(first) == expected[(trained.first,)]
        assert others + await rest(second) == expected[(trained.first, trained.second)]
        assert await rest(begin()) == expected[(trained.second,)]
        await client.add_assistant(trained.other)
        assert await rest(begin()) == expected[(trained.second, trained.other)]


async def test_a_score_keeps_what_it_began_with(trained: Trained, vllm_server: Any) -> None:
    async with AsyncUnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=trained.first) as client:
        alone = await client.score(PROMPTS[1], "It is called the Amber.")
        ask = client.backend.score

        async def overtaken(*told: Any) -> Any:
            await client.add_assistant(trained.second)
            return await ask(*told)

        client.backend.score = overtaken  # type: ignore[method-assign]
        assert await client.score(PROMPTS[1], "It is called the Amber.") == alone
        assert len(client.assistants) == 2


async def test_what_has_gone_leaves_memory_with_its_last_answer(trained: Trained, vllm_server: Any) -> None:
    before = set(threading.enumerate())
    async with AsyncUnlearnedClient(backend="vllm", base_url=vllm_server.url, assistant=[trained.first, trained.second]) as client:
        stream = client.stream(PROMPTS[0], max_new_tokens=LENGTH)
        await anext(stream)
        assert client._small is not None
        (worker,) = client._small.workers
        gone, thread = weakref.ref(worker), next(iter(worker._thread._threads))
        del worker
        await client.remove_assistant(trained.first)
        gc.collect()
        assert gone() is not None, "an answer is under way"
        assert [piece async for piece in stream][-1].result is not None
        del stream
        for _ in range(100):  # what the loop still holds of the answer goes with its next turns
            gc.collect()
            if gone() is None:
                break
            await asyncio.sleep(0.05)
        assert gone() is None
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("uld-small")]


def test_without_any_the_plain_model_answers(tiny_target: Path, trained: Trained, vllm_server: Any) -> None:
    with open_client(vllm_server, None, tokenizer=str(tiny_target)) as client:
        plain = client.generate(PROMPTS[1], max_new_tokens=LENGTH)
        assert plain.untouched
        assert plain.report.touched_by == {}
        client.add_assistant(trained.first)
        assert client.generate(PROMPTS[1], max_new_tokens=LENGTH).token_ids != plain.token_ids
        client.remove_assistant(trained.first)
        assert client.assistants == ()
        assert client.generate(PROMPTS[1], max_new_tokens=LENGTH).token_ids == plain.token_ids


def test_a_failed_addition_changes_nothing(trained: Trained, vllm_server: Any, tmp_path: Path) -> None:
    from uld_sdk.training import train

    base = lowering(tiny_model(tmp_path / "longer", vocab_size=420))
    foreign = train(base=str(base), forget=FORGET, retain=RETAIN, output=tmp_path / "foreign", steps=1, device="cpu", progress=False).path
    broken = Path(shutil.copytree(trained.second, tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    copy = Path(shutil.copytree(trained.first, tmp_path / "copy"))
    seal(copy, read_manifest(copy).model_copy(update={"alpha": 0.5}))
    with open_client(vllm_server, trained.first) as client:
        before = client.generate(PROMPTS[0], max_new_tokens=LENGTH).token_ids
        with pytest.raises(TokenizerMismatch, match="changes every text") as refused:
            client.add_assistant(foreign)
        assert f"the small model's tokenizer {foreign} beside {trained.first} changes" in str(refused.value)
        assert "byte-level BPE" in refused.value.hint
        with pytest.raises(ArtifactCorrupt, match=r"adapter_model\.safetensors differs"):
            client.add_assistant(broken)
        with pytest.raises(ArtifactCorrupt, match="is no assistant folder"):
            client.add_assistant(tmp_path / "nowhere")
        for twice in (trained.first, copy):
            with pytest.raises(UsageError, match="is there already") as caught:
                client.add_assistant(twice)
            assert "once" in caught.value.hint
        with pytest.raises(UsageError, match=r"no assistant .*second to remove") as caught:
            client.remove_assistant(trained.second)
        assert str(trained.first) in caught.value.hint
        assert client.assistants == (trained.first,)
        assert client.generate(PROMPTS[0], max_new_tokens=LENGTH).token_ids == before
    with pytest.raises(UsageError, match="is there already"):
        open_client(vllm_server, [trained.first, copy])


def test_each_may_say_where_its_base_lies(tiny_target: Path, trained: Trained, vllm_server: Any, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_target, tmp_path / "moved")
    with open_client(vllm_server, [trained.first, trained.other], assistant_base=[moved, None]) as client:
        assert client.generate(PROMPTS[0], max_new_tokens=2).usage.completion_tokens == 2
    with open_client(vllm_server, [trained.first, trained.second], assistant_base=moved) as client:
        assert client.generate(PROMPTS[0], max_new_tokens=2).usage.completion_tokens == 2
    with open_client(vllm_server, [trained.first, trained.other], assistant_base=moved) as client:
        with pytest.raises(ArtifactMismatch, match="other was trained on"):
            client.generate(PROMPTS[0], max_new_tokens=2)
    with open_client(vllm_server, trained.first) as client:
        client.add_assistant(trained.second, base=moved)
        assert len(client.assistants) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"assistant": []}, "assistant is"),
        ({"assistant": ["a", 3]}, "assistant is"),
        ({"assistant": 3}, "assistant is 3"),
        ({"assistant": ["a", None]}, "assistant is"),
        ({"assistant": ["a", "b"], "assistant_base": ["c"]}, "names 1 places for 2 assistants"),
        ({"assistant": "a", "assistant_base": 1.5}, "assistant_base is"),
    ],
)
def test_what_names_no_assistants_is_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        UnlearnedClient(backend="vllm", base_url="http://127.0.0.1:9", **options)


def run(*words: object, **environment: str) -> Any:
    outcome = CliRunner().invoke(app, [str(word) for word in words], prog_name="uld-sdk", env=environment)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome


def test_the_command_takes_several(tiny_target: Path, trained: Trained, vllm_server: Any, tmp_path: Path) -> None:
    reach = ["-b", "vllm", "-u", vllm_server.url, "--top-logprobs", K]
    both = ["-a", trained.first, "--assistant", trained.second]
    expected, counts = Sum(tiny_target, [trained.first, trained.second], trained.rules()).answer(PROMPTS[1])
    told = run("generate", PROMPTS[1], *reach, *both, "-n", LENGTH, "--json")
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["token_ids"] == expected
    assert list(document["report"]["touched_by"].values()) == counts
    shown = run("generate", PROMPTS[1], *reach, "-n", LENGTH, ULD_ASSISTANT=f"{trained.first}:{trained.second}")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.count("touched by") == 2
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": PROMPTS[1]}])
    many = run("generate", "--input", prompts, *reach, *both, "-n", LENGTH, "--json")
    assert json.loads(many.stdout)["results"][0]["token_ids"] == expected


def test_inspect_shows_each(tiny_target: Path, trained: Trained, vllm_server: Any, tmp_path: Path) -> None:
    document = json.loads(run("inspect", "-a", trained.first, "-a", trained.other, "-b", "vllm", "-u", vllm_server.url, "--json").stdout)
    assert [each["path"] for each in document["assistants"]] == [str(trained.first), str(trained.other)]
    assert document["fits"] is True
    page = run("inspect", "-a", trained.first, "-a", trained.other)
    assert page.exit_code == 0, page.stderr
    assert "the assistants are complete" in page.stdout
    moved = shutil.copytree(tiny_target, tmp_path / "moved")
    wrong = run("inspect", "-a", trained.first, "-a", trained.other, "--assistant-base", moved)
    assert wrong.exit_code == 1
    assert "it does not fit" in wrong.stdout
    right = run("inspect", "-a", trained.first, "-a", trained.second, "--assistant-base", moved)
    assert right.exit_code == 0, right.stdout


def test_the_same_one_twice_is_a_wrong_command(trained: Trained, vllm_server: Any) -> None:
    told = run("generate", "Who?", "-b", "vllm", "-u", vllm_server.url, "-a", trained.first, "-a", trained.first)
    assert told.exit_code == 2
    assert "is there already" in told.stderr
