"""The small model reads the same with caches, in batches and after a roll-back as it does afresh."""

from pathlib import Path

import numpy as np
import pytest
import torch

from decoding import likeness
from uld_offset_models.assistant import SmallModel
from uld_offset_models.scorer import Reading, Scorer, Track

TEXTS = [[5, 17, 80, 300, 41], [9, 9, 200], [350, 12, 77, 60, 61, 62, 63, 210], [33]]


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> SmallModel:
    return likeness(tiny_target)


@torch.inference_mode()
def afresh(model: SmallModel, ids: list[int]) -> np.ndarray:
    hidden = model.backbone(torch.tensor([ids])).last_hidden_state[0]
    return (torch.log_softmax(model.logits(hidden).double(), -1) + np.log(len(model.head))).numpy()


def same(readings: list[Reading], expected: np.ndarray) -> None:
    for reading, row in zip(readings, expected, strict=True):
        np.testing.assert_allclose(reading.excess(), row, atol=2e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_any_cut_of_the_texts_reads_the_same(model: SmallModel, batched: bool) -> None:
    scorer = Scorer(model)
    tracks = [Track() for _ in TEXTS]
    seen: list[list[Reading]] = [[] for _ in TEXTS]
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
        same(readings, afresh(model, text))


def test_a_rolled_back_track_goes_on_as_if_nothing_had_been(model: SmallModel) -> None:
    scorer, track = Scorer(model), Track()
    scorer.read([(track, TEXTS[0])])
    track.rollback(2)
    (readings,) = scorer.read([(track, TEXTS[2])])
    same(readings, afresh(model, TEXTS[0][:2] + TEXTS[2])[2:])


def test_only_the_last_reading_on_request(model: SmallModel) -> None:
    scorer = Scorer(model)
    several = scorer.read([(Track(), text) for text in TEXTS], every=False)
    for text, readings in zip(TEXTS, several, strict=True):
        same(readings, afresh(model, text)[-1:])


@pytest.mark.parametrize("threshold", [0.0, 1.0, 3.0])
def test_the_peak_is_exact_above_the_threshold_and_a_true_bound_below(model: SmallModel, threshold: float) -> None:
    (readings,) = Scorer(model, threshold=threshold).read([(Track(), TEXTS[2])])
    for reading, row in zip(readings, afresh(model, TEXTS[2]), strict=True):
        if reading.peak > threshold:
            assert reading.peak == pytest.approx(row.max(), abs=2e-4)
        else:
            assert row.max() <= reading.peak + 2e-4


def test_a_closed_gate_needs_no_head(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(model, threshold=3.0)
    assert model.gate is not None
    monkeypatch.setattr(model.gate, "bias", torch.nn.Parameter(torch.tensor(-20.0), requires_grad=False))
    monkeypatch.setattr(scorer, "excess", None)
    (readings,) = scorer.read([(Track(), TEXTS[0])])
    assert all(reading.peak <= 3.0 for reading in readings)
