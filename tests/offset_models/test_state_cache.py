"""Hidden states of a frozen model that are computed once: exact, shared by trainings, and no reason for a training to fail."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from uld_adapters.errors import ArtifactCorrupt, UsageError
from uld_offset_models import state_cache
from uld_offset_models.encoding import Encoded
from uld_offset_models.state_cache import kept_states

WIDTH = 6
ROWS = [Encoded((1, 2, 10 + number, 20, 4), 3) for number in range(7)]


class Model:
    """States of a row as a model would give them, and how many rows it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.asked = dtype, 0

    def __call__(self, rows: Sequence[Encoded]) -> Mapping[Encoded, Tensor]:
        self.asked += len(rows)
        return {row: torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(row.ids[2])).to(self.dtype) for row in rows}


def kept(folder: Path, rows: Sequence[Encoded], model: Model, **changes: Any) -> Mapping[Encoded, Tensor]:
    return kept_states(folder, rows, model, **{"weights_sha256": "a" * 64, "dtype": model.dtype, "width": WIDTH, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Model(dtype)
    found = kept(tmp_path / "states", ROWS, model)
    assert list(found) == ROWS
    for row, states in model(ROWS).items():
        assert found[row].dtype == dtype
        assert torch.equal(found[row], states)
    with pytest.raises(KeyError):
        found[Encoded((9, 9, 9), 1)]


def test_only_what_is_missing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache, "_ROWS", 2)
    model = Model()
    kept(tmp_path / "states", ROWS[:3], model)
    assert model.asked == 3
    found = kept(tmp_path / "states", ROWS, model)
    assert model.asked == 7
    assert kept(tmp_path / "states", ROWS[2:4], model).keys() == set(ROWS[2:4])
    assert model.asked == 7
    assert all(torch.equal(found[row], states) for row, states in Model()(ROWS).items())


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache, "_ROWS", 2)
    model = Model()

    def stopped(rows: Sequence[Encoded]) -> Mapping[Encoded, Tensor]:
        if model.asked == 4:
            raise KeyboardInterrupt
        return model(rows)

    with pytest.raises(KeyboardInterrupt):
        kept_states(tmp_path / "states", ROWS, stopped, weights_sha256="a" * 64, dtype=torch.float32, width=WIDTH)
    kept(tmp_path / "states", ROWS, model)
    assert model.asked == 7


def test_states_of_another_model_are_refused(tmp_path: Path) -> None:
    kept(tmp_path / "states", ROWS, Model())
    with pytest.raises(UsageError, match="was made for another model: aaaaaaaaaaaa…, not bbbbbbbbbbbb…"):
        kept(tmp_path / "states", ROWS, Model(), weights_sha256="b" * 64)
    with pytest.raises(UsageError, match="was made for another precision: float32, not bfloat16"):
        kept(tmp_path / "states", ROWS, Model(torch.bfloat16))


def test_damage_is_named(tmp_path: Path) -> None:
    kept(tmp_path / "states", ROWS, Model())
    file = tmp_path / "states" / "00000.rows"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match=r"the shard .*00000\.rows is not as it was written"):
        kept(tmp_path / "states", ROWS, Model())


def test_a_full_disk_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match="hidden states are not kept for another training: .* the disk is full"):
        found = kept(tmp_path / "states", ROWS, Model())
    assert all(torch.equal(found[row], states) for row, states in Model()(ROWS).items())
