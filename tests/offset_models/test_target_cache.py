"""The cache of the target's log-probabilities: precision, look-up, interruption, damage, full disks, and caches of something else."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uld_adapters.errors import ArtifactCorrupt, MalformedAnswer, SaveFailed, UsageError
from uld_adapters.logprobs import Score, TopLogprobs
from uld_offset_models import shards
from uld_offset_models.encoding import Encoded
from uld_offset_models.store import check_identity
from uld_offset_models.store_writer import StoreWriter
from uld_offset_models.target_cache import CacheManifest, TargetCache, TargetLogprobs
from uld_offset_models.target_record import pack, unpack

IDENTITY: dict[str, Any] = {
    "target": "large", "backend": "vllm", "scoring": "prompt", "top_logprobs": 5, "tokenizer_sha256": "a" * 64, "template_sha256": "b" * 64,
    "data": {"forget": "c" * 64, "retain": "d" * 64},
}  # fmt: skip


def wanted(**changes: Any) -> CacheManifest:
    return CacheManifest(**{**IDENTITY, **changes})


def rows(count: int, *, first: int = 0) -> list[Encoded]:
    return [Encoded((1, 2, 3, 10 + number, 20, 21, 4), 4) for number in range(first, first + count)]


def values(row: Encoded, *, k: int = 5, vocabulary: int = 400) -> TargetLogprobs:
    """Log-probabilities as a server reports them, the same for the same row."""
    random = np.random.default_rng(row.ids)
    logits = random.normal(scale=4.0, size=(len(row.answer), vocabulary))
    logprobs = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    positions = tuple(TopLogprobs.build(np.argsort(-line)[:k], np.sort(line)[::-1][:k]) for line in logprobs)
    label = np.array([np.nan if top.of(token) is None else top.of(token) for top, token in zip(positions, row.answer, strict=True)])
    return TargetLogprobs.from_score(Score(row.answer, label, positions))


def filled(path: Path, kept: list[Encoded], *, finish: bool = True, of: list[Encoded] | None = None, **changes: Any) -> Path:
    with StoreWriter(path, wanted(**changes), of or kept) as writer:
        for row in kept:
            writer.put(row, pack(values(row)))
        if finish:
            writer.finish()
    return path


def same(found: TargetLogprobs, expected: TargetLogprobs) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1 / 4096 + 1e-6)
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_array_equal(found.tail, expected.tail)
    assert found.complete == expected.complete


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS", 4)


@pytest.mark.usefixtures("small_shards")
def test_what_was_put_in_is_found(tmp_path: Path) -> None:
    kept = rows(10)
    cache = TargetCache.open(filled(tmp_path / "cache", kept))
    assert (len(cache), cache.target, cache.top_logprobs) == (10, "large", 5)
    assert [(seal.name, seal.rows) for seal in cache.manifest.shards] == [("00000.rows", 4), ("00001.rows", 4), ("00002.rows", 2)]
    for row in kept:
        same(cache.find(row.prompt, row.answer), values(row))
    cache.check({row: "here" for row in kept})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 30), st.sampled_from([300, 70_000]), st.floats(0.01, 60.0), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_a_record_keeps_log_probabilities_to_a_thousandth_of_a_nat(n: int, k: int, size: int, scale: float, label: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    logprobs = -np.sort(random.exponential(scale, (n, k)), axis=1).astype(np.float32)
    ids = np.stack([random.choice(size, k, replace=False) for _ in range(n)]).astype(np.int32)
    own = np.where(label, random.normal(-3, 1, n), np.nan).astype(np.float32)
    tail = random.uniform(size=n).astype(np.float32)
    given_values = TargetLogprobs(ids, logprobs, own, tail)
    same(unpack(pack(given_values)), given_values)


def test_a_complete_distribution_comes_back_in_the_order_of_the_ids() -> None:
    row = Encoded((1, 5, 2), 1)
    line = np.log(np.array([[0.1, 0.2, 0.3, 0.05, 0.05, 0.3], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]]))
    positions = tuple(TopLogprobs(np.argsort(-p), np.sort(p)[::-1], complete=True) for p in line)
    packed = pack(TargetLogprobs.from_score(Score(row.answer, line[[0, 1], [5, 2]], positions)))
    found = unpack(packed)
    assert found.complete
    np.testing.assert_array_equal(found.ids, [range(6), range(6)])
    np.testing.assert_allclose(found.logprobs, line, atol=1e-3)
    np.testing.assert_array_equal(found.tail, [0, 0])
    assert len(packed) == 12 + 2 * 8 + 2 * 6 * 2  # ids in order take no room


def test_a_server_that_reports_more_here_than_there_is_not_believed() -> None:
    positions = tuple(TopLogprobs.build(list(range(k)), [-2.0 - i for i in range(k)]) for k in (3, 2))
    with pytest.raises(MalformedAnswer, match="reported 2, 3 log-probabilities at positions of one text"):
        TargetLogprobs.from_score(Score((1, 2), np.array([-2.0, -2.0]), positions))


def test_tokens_that_nobody_can_tell_are_in_the_mass_of_the_others() -> None:
    full, short = TopLogprobs.build([3, 1, 2], [-1.0, -2.0, -3.0]), TopLogprobs.build([1, 2], [-0.5, -2.0], neutral=(-1.5,))
    found = TargetLogprobs.from_score(Score((2, 1), np.array([-3.0, -0.5]), (full, short)))
    np.testing.assert_array_equal(found.ids, [[3, 1], [1, 2]])
    np.testing.assert_allclose(found.tail, 1 - np.exp([[-1.0, -2.0], [-0.5, -2.0]]).sum(1), rtol=1e-6)
    np.testing.assert_allclose(found.label, [-3.0, -0.5])


def test_shards_are_compressed_and_mapped(tmp_path: Path) -> None:
    kept = rows(50)
    path = filled(tmp_path / "cache", kept)
    found = [values(row) for row in kept]
    plain = sum(v.ids.nbytes + v.logprobs.nbytes + v.label.nbytes + v.tail.nbytes for v in found)
    assert (path / "00000.rows").stat().st_size < plain
    packed = pack(found[0])
    assert zlib.compress(packed) in (path / "00000.rows").read_bytes()
    cache = TargetCache.open(path)
    (path / "00000.rows").unlink()  # the map holds the file
    same(cache.find(kept[7].prompt, kept[7].answer), values(kept[7]))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kept", [0, 3, 4, 7])
def test_an_interrupted_cache_goes_on(tmp_path: Path, kept: int) -> None:
    every, path = rows(10), tmp_path / "cache"
    filled(path, every[:kept], finish=False, of=every)
    with pytest.raises(UsageError, match=f"is not finished: it holds {kept} of 10 rows\n  fix: run the same `uld-sdk cache` again"):
        TargetCache.open(path)
    with StoreWriter(path, wanted(), every) as writer:
        assert (writer.missing, writer.stored) == (every[kept:], every[:kept])
        for row in writer.missing:
            writer.put(row, pack(values(row)))
        writer.finish()
    cache = TargetCache.open(path)
    for row in every:
        same(cache.find(row.prompt, row.answer), values(row))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("torn", [1, 20, 30, 200])
def test_a_record_that_was_torn_is_the_only_one_lost(tmp_path: Path, torn: int) -> None:
    every, path = rows(10), tmp_path / "cache"
    filled(path, every[:7], finish=False, of=every)
    file = path / "00001.rows"
    before = file.stat().st_size
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:torn] if torn < 100 else whole + bytes(torn))
    with StoreWriter(path, wanted(), every) as writer:
        assert writer.stored == every[:7]
        assert file.stat().st_size == before
        for row in writer.missing:
            writer.put(row, pack(values(row)))
        writer.finish()
    assert len(TargetCache.open(path)) == 10


KILLED = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_target_cache as t
every = t.rows(10)
with t.StoreWriter(Path({folder!r}), t.wanted(), every) as writer:
    for row in every[:6]:
        writer.put(row, t.pack(t.values(row)))
    os.kill(os.getpid(), 9)
"""


def test_a_process_that_is_killed_loses_nothing_that_was_put_in(tmp_path: Path) -> None:
    path, every = tmp_path / "cache", rows(10)
    code = KILLED.format(path=[str(Path(__file__).parent), *sys.path], folder=str(path))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    with StoreWriter(path, wanted(), every) as writer:
        assert (writer.stored, writer.missing) == (every[:6], every[6:])


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_shard_is_named_and_only_its_rows_are_made_anew(tmp_path: Path, damage: str) -> None:
    every = rows(10)
    path = filled(tmp_path / "cache", every)
    file = path / "00001.rows"
    data = bytearray(file.read_bytes())
    if damage == "byte":
        data[40] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-5])
    else:
        file.unlink()
    message = f"the shard {file} is missing" if damage == "gone" else f"the shard {file} is not as it was written"
    with pytest.raises(ArtifactCorrupt, match=message) as caught:
        TargetCache.open(path)
    if damage != "gone":
        assert caught.value.hint == "delete this file and run the same command again: only its rows are made anew"
        with pytest.raises(ArtifactCorrupt, match=message):
            StoreWriter(path, wanted(), every)
        file.unlink()
    with StoreWriter(path, wanted(), every) as writer:
        assert writer.missing == every[4:8]
        for row in writer.missing:
            writer.put(row, pack(values(row)))
        writer.finish()
    cache = TargetCache.open(path)
    for row in every:
        same(cache.find(row.prompt, row.answer), values(row))


def test_damage_in_the_middle_of_an_open_shard_is_not_taken_for_a_torn_end(tmp_path: Path) -> None:
    every, path = rows(10), tmp_path / "cache"
    filled(path, every[:6], finish=False, of=every)
    file = path / "00000.rows"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match=f"the shard {file} is damaged after 0 bytes"):
        StoreWriter(path, wanted(), every)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace('"large"', '"other"'), "is not as it was written"),
        (lambda text: text[:-20], "is not whole JSON"),
        (lambda text: text.replace('"rows"', '"lines"', 1), "is no valid manifest: lines: Extra inputs"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2; this version reads format 1"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    path = filled(tmp_path / "cache", rows(3))
    file = path / "cache.json"
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ArtifactCorrupt, match=message):
        TargetCache.open(path)


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no cache: cache\.json cannot be read\n  fix: give the folder that `uld-sdk cache -o` wrote"):
        TargetCache.open(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is no cache"):
        StoreWriter(tmp_path, wanted(), rows(3))


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    every = rows(3)
    path = filled(tmp_path / "cache", every)
    for change, message in (
        ({"target": "small"}, "was made for another target: large, not small"),
        ({"tokenizer_sha256": "e" * 64}, "was made for another tokenizer: aaaaaaaaaaaa…, not eeeeeeeeeeee…"),
        ({"template_sha256": "e" * 64}, "was made for another chat template: bbbbbbbbbbbb…, not eeeeeeeeeeee…"),
        ({"top_logprobs": 20}, "was made for another number of log-probabilities: 5, not 20"),
        ({"top_logprobs": None}, "was made for another number of log-probabilities: 5, not None"),
        ({"data": {"forget": "c" * 64}}, "was made for other data: retain differ"),
    ):
        with pytest.raises(UsageError, match=message):
            StoreWriter(path, wanted(**change), every)
    cache = TargetCache.open(path)  # training compares what it knows itself
    for field, what in (("tokenizer_sha256", "tokenizer"), ("template_sha256", "chat template")):
        with pytest.raises(UsageError, match=f"another {what}: .*\n  fix: make it anew"):
            check_identity(cache.path, cache.manifest, {field: "e" * 64}, hint="make it anew")
    check_identity(cache.path, cache.manifest, {"tokenizer_sha256": "a" * 64, "template_sha256": "b" * 64}, hint="")


def test_rows_that_it_lacks_are_named(tmp_path: Path) -> None:
    kept, others = rows(3), rows(5, first=50)
    cache = TargetCache.open(filled(tmp_path / "cache", kept))
    with pytest.raises(UsageError, match=r"lacks 1 of 1 rows, forget\.jsonl:7\n  fix: make it with the same --forget"):
        cache.find(others[0].prompt, others[0].answer, place="forget.jsonl:7")
    with pytest.raises(UsageError, match="a row of 4 prompt tokens and 3 answer tokens"):
        cache.find(others[0].prompt, others[0].answer)
    with pytest.raises(UsageError, match="lacks 5 of 8 rows, f:50, f:51, f:52 and others"):
        cache.check({row: f"f:{number}" for number, row in [*enumerate(kept), *enumerate(others, 50)]})
    one = kept[0]
    with pytest.raises(UsageError, match="was made for other data"):  # the same ids, but another part of them is the answer
        cache.find(one.prompt[:-1], (one.prompt[-1], *one.answer))


def test_other_data_can_be_added(tmp_path: Path) -> None:
    kept, more = rows(3), rows(2, first=50)
    path = filled(tmp_path / "cache", kept)
    other = wanted(data={"forget": "f" * 64})
    with pytest.raises(UsageError, match="--extend keeps its rows and adds those that it lacks"):
        StoreWriter(path, other, more)
    with StoreWriter(path, other, [*kept[:1], *more], extend=True) as writer:
        assert writer.missing == more
        for row in more:
            writer.put(row, pack(values(row)))
        assert writer.finish().rows == 5
    cache = TargetCache.open(path)
    assert (len(cache), cache.manifest.data) == (5, {"forget": "f" * 64})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "cache", wanted(), rows(3)), pytest.raises(UsageError, match="another process is writing to"):
        StoreWriter(tmp_path / "cache", wanted(), rows(3))
    StoreWriter(tmp_path / "cache", wanted(), rows(3)).__exit__()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("writes", [0, 1, 5, 6])
def test_a_full_disk_costs_no_row_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    every, path, count = rows(10), tmp_path / "cache", 0
    pwrite = os.pwrite

    def full(handle: int, data: bytes, at: int) -> int:
        nonlocal count
        count += 1
        if count <= writes:
            return pwrite(handle, data, at)
        pwrite(handle, data[:30], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SaveFailed, match="could not be written: the disk is full\n  fix: free some space and run the same command again"):
        filled(path, every)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with StoreWriter(path, wanted(), every) as writer:
        assert writer.missing == every[writes:]


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "cache", rows(3))
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == {".lock": 0o600, "cache.json": 0o600, "00000.rows": 0o600}
    assert "What is" not in json.dumps((path / "cache.json").read_text())
