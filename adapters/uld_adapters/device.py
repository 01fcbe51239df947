"""The torch devices of this machine by name."""

from typing import TYPE_CHECKING

from uld_adapters.errors import UsageError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> "torch.device":
    """The device of that name, tried out; `auto` is a GPU where there is one. Raises `UsageError`."""
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"the device {name!r} cannot be used: {first}", hint="use cpu, cuda (with a CUDA build of torch) or auto"
        ) from error
    return device
