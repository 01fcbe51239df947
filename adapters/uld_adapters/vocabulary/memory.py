"""What was made before is not made again."""

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")
_KEPT = 100_000


class Memory(dict[K, T]):
    """What `make` gives for each key, made when it is first asked for; a memory that grows too large begins anew."""

    def __init__(self, make: Callable[[K], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: K) -> T:
        if len(self) >= _KEPT:
            self.clear()
        found = self[key] = self._make(key)
        return found
