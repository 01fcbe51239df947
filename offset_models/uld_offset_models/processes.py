"""Training in several processes (`accelerate launch`, torchrun): sums over all of them, and what rank 0 decides for all.

Each call is a meeting: every process must come to it, in the same order, or the others wait for it.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from uld_adapters.errors import TrainingError, UldError

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is rank 0, or the only one; no meeting."""
    return not _several() or dist.get_rank() == 0


def summed(values: Tensor) -> Tensor:
    """The sum of every process's values."""
    if _several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    if not _several():
        return flag
    flags = [False] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


def from_main(work: Callable[[], T]) -> T:
    """Do it in rank 0 alone; every process returns what came of it, or raises the same error."""
    if not _several():
        return work()
    if dist.get_rank() == 0:
        try:
            value = work()
        except BaseException as error:  # told before it is raised: the others would wait for an answer that never comes
            known = isinstance(error, UldError)
            dist.broadcast_object_list([None, error if known else TrainingError(f"rank 0 ended with {error!r}", hint="see its output")])
            raise
        dist.broadcast_object_list([value, None])
        return value
    heard: list[object] = [None, None]
    dist.broadcast_object_list(heard)
    if isinstance(heard[1], UldError):
        raise heard[1]
    return heard[0]  # type: ignore[return-value]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
