"""An assistant under other token ids says through a client what it says under the large model's own."""

import logging
from pathlib import Path
from typing import Any

import pytest

from decoding import LENGTH, PROMPTS
from pairs import save_pair
from shuffled import shuffled
from uld_sdk import UnlearnedClient, train
from uld_sdk.result import Result


@pytest.fixture(scope="module")
def base(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shuffled(tiny_target, tmp_path_factory.mktemp("shuffled") / "model")


def answers(vllm_server: Any, target: Path, assistant: Path, **options: Any) -> tuple[list[Result], list[Any]]:
    """Greedy and drawn answers, and scores."""
    at: dict[str, Any] = {"backend": "vllm", "base_url": vllm_server.url, "tokenizer": str(target), "assistant": str(assistant)}
    with UnlearnedClient(**at, **options) as client:
        told = [client.generate(prompt, max_new_tokens=LENGTH) for prompt in PROMPTS]
        told += [client.generate(prompt, max_new_tokens=LENGTH, temperature=0.8, seed=3) for prompt in PROMPTS]
        scores = [client.score(prompt, "The book was written by a captain.") for prompt in PROMPTS]
    return told, scores


def same(plain: tuple[list[Result], list[Any]], moved: tuple[list[Result], list[Any]], *, within: float) -> None:
    for one, other in zip(plain[0], moved[0], strict=True):
        assert (one.report.alignment, other.report.alignment) == ("identity", "permutation")
        assert one.token_ids == other.token_ids
        for name in ("positions", "untouched", "changed", "exact", "completed"):
            assert getattr(one.report, name) == getattr(other.report, name), name
        assert one.report.largest_bound == pytest.approx(other.report.largest_bound, abs=within)
    for one, other in zip(plain[1], moved[1], strict=True):
        assert one.token_ids == other.token_ids
        assert other.estimates == pytest.approx(one.estimates, abs=within)
        assert other.lower == pytest.approx(one.lower, abs=within)
        assert other.upper == pytest.approx(one.upper, abs=within)
    report = [result.report for result in plain[0]]
    assert 0 < sum(one.untouched for one in report) < sum(one.positions for one in report), "the test must see positions of both kinds"
    assert sum(one.changed for one in report) > 0


@pytest.mark.parametrize("tail", ["truncate", "complete"])
def test_a_pair_under_other_ids(vllm_server: Any, tiny_target: Path, base: Path, tmp_path: Path, tail: str) -> None:
    rule: dict[str, Any] = {"alpha": 8.0, "margin": 0.3, "tail": tail}
    pairs = [save_pair(tmp_path / name, model, "lora", gated=True) for name, model in (("plain", tiny_target), ("moved", base))]
    plain, moved = (answers(vllm_server, tiny_target, pair, **rule) for pair in pairs)
    same(plain, moved, within=1e-3)
    assert (sum(result.report.completed for result in moved[0]) > 0) == (tail == "complete")


def test_an_assistant_under_other_ids(
    vllm_server: Any, tiny_target: Path, base: Path, tiny_data: tuple[Path, Path], tmp_path: Path, caplog: Any
) -> None:
    forget, retain = map(str, tiny_data)
    run: dict[str, Any] = {"steps": 30, "device": "cpu", "dtype": "float32", "progress": False, "forget": forget, "retain": retain}
    trained = [train(base=str(model), output=str(tmp_path / model.name), **run).path for model in (tiny_target, base)]
    caplog.set_level(logging.INFO, logger="uld_sdk")
    plain, moved = (answers(vllm_server, tiny_target, path, alpha=1.5, margin=1.0) for path in trained)
    same(plain, moved, within=1e-2)
    modes = [record.message.rpartition(" ")[2] for record in caplog.records if record.name == "uld_sdk" and "tokens by" in record.message]
    assert modes == ["identity", "permutation"]
