"""Several adapters in one batch, and linear layers for a few positions, against the plain forms of both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pairs import Whole, save_pair
from tiny import tiny_model
from tiny_rows import FORGET, RETAIN
from uld_adapters.errors import ArtifactMismatch
from uld_offset_models.adapter_batch import BatchedLora, Delta, Parts
from uld_offset_models.batch_reading import GroupScorer
from uld_offset_models.loading import load_artifact, load_together
from uld_offset_models.manifest import read_manifest
from uld_offset_models.thin import ThinLinear, thin_linear


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [96, 20], ids=["widens", "narrows"])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (2, 1), (1, 3), (2, 2), (5,), (3, 4), (0,)])
def test_a_thin_product_is_the_plain_one(shape: tuple[int, ...], rows: int) -> None:
    x, weight, bias = drawn(*shape, 48), drawn(rows, 48, seed=1), drawn(rows, seed=2)
    torch.testing.assert_close(thin_linear(x, weight), functional.linear(x, weight), atol=1e-5, rtol=0)
    torch.testing.assert_close(ThinLinear(weight, bias)(x), functional.linear(x, weight, bias), atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [None, (2, 2, 2), (1, 3, 2), (0, 4, 2), (6, 0, 0)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_each_part_goes_through_its_own_adapter(counts: tuple[int, ...] | None, tokens: int) -> None:
    weight, bias = drawn(20, 16), drawn(20, seed=1)
    deltas: list[Delta | None] = [(drawn(4, 16, seed=2), drawn(20, 4, seed=3)), None, (drawn(2, 16, seed=4), drawn(20, 2, seed=5))]
    layer = BatchedLora(weight, bias, deltas, Parts(3, counts))
    x = drawn(6, tokens, 16, seed=6)
    expected, at = [], 0
    for count, delta in zip(counts or (2, 2, 2), deltas, strict=True):
        for row in x[at : at + count]:
            expected.append(row @ (weight if delta is None else weight + delta[1] @ delta[0]).T + bias)
        at += count
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-4, rtol=0)


def test_a_batch_that_is_not_divided_by_its_parts_is_refused() -> None:
    layer = BatchedLora(drawn(20, 16), None, [None, None], Parts(2, (1, 2)))
    with pytest.raises(ValueError, match=r"a batch of 4 rows is not divided by \(1, 2\)"):
        layer(drawn(4, 1, 16))


@pytest.fixture(scope="module")
def artifacts(tiny_target: Path, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one base three assistants, whose gates and ranks differ (one has no gate), and a pair."""
    from uld_sdk.training import train

    folder = tmp_path_factory.mktemp("together")
    settings: list[dict[str, Any]] = [{"rank": 4, "lora_alpha": 8, "seed": 3}, {"rank": 2, "lora_alpha": 2, "gate": False, "margin": 1.0}]
    more = []
    for number, options in enumerate(settings):
        data = {"base": str(tiny_target), "forget": RETAIN[:3], "retain": FORGET, "output": folder / str(number)}
        more.append(train(**data, steps=20, device="cpu", dtype="float32", progress=False, **options).path)
    return [tiny_artifact, *more, save_pair(folder / "pair", tiny_target, "lora", gated=True)]


@pytest.fixture(scope="module")
def together(artifacts: list[Path]) -> tuple[GroupScorer, list[int]]:
    """A scorer of all three, and how many rows each forward pass of the backbone had."""
    loaded = load_together(artifacts)
    batches: list[int] = []
    loaded[0].small.backbone.register_forward_pre_hook(lambda _, __, words: batches.append(len(words["input_ids"])), with_kwargs=True)
    return GroupScorer([artifact.scorer(threshold=limit) for artifact, limit in zip(loaded, THRESHOLDS, strict=True)]), batches


TEXTS = [[5, 17, 80, 300, 41], [9, 9, 200], [350, 12, 77, 60, 61, 62, 63, 210], [33], [4, 8, 15, 16, 23, 42], [90, 91, 7, 5, 300]]
OWNERS = [0, 1, 2, 2, 0, 3]
THRESHOLDS = [3.0, 3.0, 1.0, 0.3]


@torch.inference_mode()
def alone(folder: Path, base: Path, ids: list[int]) -> tuple[np.ndarray, list[float] | None]:
    """The excess, of a pair the change, after each token and the gates, by an artifact alone: merged, or as two models."""
    if read_manifest(folder).pair is not None:
        change, _, gates = Whole(folder, base, "lora", gated=True).read(ids)
        return change, gates.tolist()
    model = load_artifact(folder).small
    hidden = model.backbone(torch.tensor([ids])).last_hidden_state[0]
    excess = (torch.log_softmax(model.logits(hidden).double(), -1) + np.log(len(model.head))).numpy()
    return excess, None if model.gate is None else model.gate(hidden).tolist()


def test_in_one_batch_each_reads_as_if_alone(artifacts: list[Path], tiny_target: Path, together: tuple[GroupScorer, list[int]]) -> None:
    """Texts cut at random, read by four artifacts in whatever order, each with the caches of its own."""
    scorer, batches = together
    rng = np.random.default_rng(1)
    tracks = [together[0].track(owner) for owner in OWNERS]
    seen: list[list[Any]] = [[] for _ in TEXTS]
    left = [list(text) for text in TEXTS]
    passes = len(batches)
    while any(left):
        jobs = []
        for number in rng.permutation(len(TEXTS)):
            if left[number] and rng.random() < 0.7:
                size = int(rng.integers(1, len(left[number]) + 1))
                jobs.append((number, left[number][:size]))
                left[number] = left[number][size:]
        if jobs:
            passes += 1
            for (number, _), readings in zip(jobs, scorer.read([(tracks[n], new) for n, new in jobs]), strict=True):
                seen[number] += readings
    assert len(batches) == passes, "one pass of the backbone for all of them"
    for text, owner, readings in zip(TEXTS, OWNERS, seen, strict=True):
        excess, gates = alone(artifacts[owner], tiny_target, text)
        for at, reading in enumerate(readings):
            np.testing.assert_allclose(reading.excess(), excess[at], atol=2e-4)
            assert reading.gate == (None if gates is None else pytest.approx(gates[at], abs=1e-5))
            largest = excess[at].max() if owner < 3 else np.abs(excess[at]).max()
            assert (reading.peak > THRESHOLDS[owner]) == (largest > THRESHOLDS[owner])
            if owner == 3:
                frozen = Whole(artifacts[3], tiny_target, "lora", gated=True).read(text)[1]
                np.testing.assert_allclose(reading.frozen(), frozen[at], atol=2e-4)


def test_only_the_last_reading_where_no_other_is_wanted(
    artifacts: list[Path], tiny_target: Path, together: tuple[GroupScorer, list[int]]
) -> None:
    jobs = [(together[0].track(owner), text) for text, owner in zip(TEXTS, OWNERS, strict=True)]
    for (reading,), text, owner in zip(together[0].read(jobs, every=False), TEXTS, OWNERS, strict=True):
        np.testing.assert_allclose(reading.excess(), alone(artifacts[owner], tiny_target, text)[0][-1], atol=2e-4)


def test_artifacts_of_two_bases_are_not_loaded_together(tiny_artifact: Path, tmp_path: Path) -> None:
    from uld_sdk.training import train

    base = tiny_model(tmp_path / "other", seed=7)
    other = train(base=str(base), forget=FORGET, retain=RETAIN, output=tmp_path / "a", steps=1, device="cpu", progress=False).path
    with pytest.raises(ArtifactMismatch, match=r"was trained on .*other .*, but .*tiny-target has SHA-256"):
        load_together([tiny_artifact, other])
