"""Where training runs."""

import pytest
import torch

from uld_offset_models.device import choose_device


def test_a_gpu_is_chosen_whatever_was_trained_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training on the CPU leaves accelerate's state behind, which remembers the CPU."""
    from accelerate import PartialState

    PartialState(cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == "cuda:0"
    assert (choose_device("cuda:1"), choose_device("cpu")) == ("cuda:1", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")  # as accelerate launch and torchrun set it
    for count, device in ((4, "cuda:3"), (1, "cuda:0")):  # a launcher may show each process one GPU only
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert choose_device("cuda") == device
