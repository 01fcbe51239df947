"""What was made before is not made again."""

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")
_KEPT = 50_000


class Memory(dict[K, T]):
    """What `make` gives for each key, made when it is first asked for; a memory of more than `kept` begins anew."""

    def __init__(self, make: Callable[[K], T], *, kept: int = _KEPT) -> None:
        super().__init__()
        self._make, self._kept = make, kept

    def __missing__(self, key: K) -> T:
        if len(self) >= self._kept:
            self.clear()
        found = self[key] = self._make(key)
        return found
