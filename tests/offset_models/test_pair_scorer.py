"""A pair reads the same with caches, in batches and after a roll-back as both of its models do afresh."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pairs import KINDS, Whole, save_pair
from uld_adapters.errors import ArtifactCorrupt
from uld_offset_models.loading import load_artifact
from uld_offset_models.pair import Pair
from uld_offset_models.pair_scorer import PairReading, PairScorer

TEXTS = [[5, 17, 80, 300, 41], [9, 9, 200], [350, 12, 77, 60, 61, 62, 63, 210], [33]]


class Case:
    def __init__(self, folder: Path, base: Path, kind: str, *, gated: bool) -> None:
        self.whole = Whole(folder, base, kind, gated=gated)
        self.artifact = load_artifact(folder)
        assert isinstance(self.artifact.model, Pair)
        self.pair = self.artifact.model

    def scorer(self, threshold: float = 0.0) -> PairScorer:
        return PairScorer(self.pair, threshold=threshold)

    def same(self, readings: list[PairReading], text: list[int]) -> None:
        for reading, change, frozen, gate in zip(readings, *self.whole.read(text), strict=True):
            np.testing.assert_allclose(reading.excess(), change, atol=5e-4)
            np.testing.assert_allclose(reading.frozen(), frozen, atol=5e-4)
            assert reading.gate is None or reading.gate == pytest.approx(gate, abs=1e-5)


@pytest.fixture(scope="module", params=[(kind, gated) for kind in KINDS for gated in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, gated = request.param
    folder = save_pair(tmp_path_factory.mktemp("pair") / "pair", tiny_target, kind, gated=gated)
    return Case(folder, tiny_target, kind, gated=gated)


@pytest.mark.parametrize("batched", [False, True])
def test_any_cut_of_the_texts_reads_the_same(case: Case, batched: bool) -> None:
    scorer = case.scorer()
    tracks = [scorer.track() for _ in TEXTS]
    seen: list[list[PairReading]] = [[] for _ in TEXTS]
    rng = np.random.default_rng(0)
    left = [list(text) for text in TEXTS]
    while any(left):
        jobs = []
        for number, rest in enumerate(left):
            if rest:
                size = int(rng.integers(1, len(rest) + 1))
                jobs.append((number, rest[:size]))
                left[number] = rest[size:]
        for group in [jobs] if batched else [[job] for job in jobs]:
            for (number, _), readings in zip(group, scorer.read([(tracks[n], new) for n, new in group]), strict=True):
                seen[number] += readings
    for text, readings in zip(TEXTS, seen, strict=True):
        case.same(readings, text)


def test_a_rolled_back_text_goes_on_as_if_it_had_never_been_longer(case: Case) -> None:
    scorer = case.scorer()
    track = scorer.track()
    scorer.read([(track, TEXTS[0])])
    track.rollback(2)
    assert track.tokens == TEXTS[0][:2]
    (readings,) = scorer.read([(track, TEXTS[2])])
    for reading, change in zip(readings, case.whole.read(TEXTS[0][:2] + TEXTS[2])[0][2:], strict=True):
        np.testing.assert_allclose(reading.excess(), change, atol=5e-4)
    track.rollback(0)
    (readings,) = scorer.read([(track, TEXTS[1])])
    case.same(readings, TEXTS[1])


def test_only_the_last_reading_on_request(case: Case) -> None:
    scorer = case.scorer()
    for text, readings in zip(TEXTS, scorer.read([(scorer.track(), text) for text in TEXTS], every=False), strict=True):
        change, _, _ = case.whole.read(text)
        assert len(readings) == 1
        np.testing.assert_allclose(readings[0].excess(), change[-1], atol=5e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 30.0])
def test_the_peak_is_exact_above_the_threshold_and_a_true_bound_below(case: Case, threshold: float) -> None:
    scorer = case.scorer(threshold)
    (readings,) = scorer.read([(scorer.track(), TEXTS[2])])
    for reading, change in zip(readings, case.whole.read(TEXTS[2])[0], strict=True):
        largest = np.abs(change).max()
        if reading.peak > threshold:
            assert reading.peak == pytest.approx(largest, abs=1e-3)
        else:
            assert largest <= reading.peak + 1e-3


def test_both_models_run_in_one_pass_where_they_share_their_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    for module in {id(m.backbone): m.backbone for m in (case.pair.tuned, case.pair.frozen)}.values():
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, f=forward, **k: (passes.append(1), f(*a, **k))[1])
    scorer = case.scorer()
    scorer.read([(scorer.track(), text) for text in TEXTS])
    assert len(passes) == (1 if case.pair.shared else 2)


def test_a_shut_gate_needs_no_head_and_proves_every_position_untouched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.pair.tuned.gate is None:
        return
    scorer = case.scorer()
    monkeypatch.setattr(scorer, "logprobs", None)
    monkeypatch.setattr(case.pair.tuned.gate, "bias", torch.nn.Parameter(torch.tensor(-200.0), requires_grad=False))
    monkeypatch.setattr(case.pair.tuned.gate, "weight", torch.nn.Parameter(torch.zeros(64), requires_grad=False))
    (readings,) = scorer.read([(scorer.track(), TEXTS[0])])
    assert [reading.peak for reading in readings] == [0.0] * len(TEXTS[0])


def test_an_untrained_adapter_is_no_change(tiny_target: Path, tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "pair", tiny_target, "lora", gated=False, noise=0.0)
    pair = load_artifact(folder).model
    assert isinstance(pair, Pair)
    scorer = PairScorer(pair, threshold=1e-3)
    (readings,) = scorer.read([(scorer.track(), TEXTS[2])])
    assert max(reading.peak for reading in readings) < 1e-4


def test_virtual_tokens_count_in_the_context(tiny_target: Path, tmp_path: Path) -> None:
    folders = {kind: save_pair(tmp_path / kind, tiny_target, kind, gated=False) for kind in ("lora", "p-adapter")}
    assert {kind: load_artifact(folder).context for kind, folder in folders.items()} == {"lora": 512, "p-adapter": 509}


def test_a_pair_without_its_weights_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    for kind, name in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        folder = save_pair(tmp_path / kind, tiny_target, kind, gated=True)
        (folder / name).unlink()
        with pytest.raises(ArtifactCorrupt, match=rf"{name} is missing"):
            load_artifact(folder)
