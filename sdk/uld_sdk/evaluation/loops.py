"""Degeneration: answers that turn in a circle."""

from collections import Counter
from collections.abc import Iterable, Sequence


def loops(token_ids: Sequence[int], *, n: int = 4, most: int = 3) -> bool:
    """Whether any n-gram of tokens occurs more than `most` times, overlapping occurrences counted."""
    grams = Counter(tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1))
    return max(grams.values(), default=0) > most


def count_loops(answers: Iterable[Sequence[int]]) -> int:
    """The number of answers that loop."""
    return sum(loops(answer) for answer in answers)
