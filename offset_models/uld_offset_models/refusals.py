"""Refusals for `dpo` and `relabel`: a file of the user's, one a line, or the list of our own that is called `built-in`."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from uld_adapters.errors import DataError
from uld_offset_models.data import Example
from uld_offset_models.sources import read_text

BUILT_IN = "built-in"
_STREAM = 5  # of the seed, apart from those that deal the rows


def read_refusals(source: str) -> tuple[str, ...]:
    """The distinct lines of a text file that are not blank, or our own list by the name `built-in`; raises `DataError`."""
    if source == BUILT_IN:
        text = (resources.files("uld_offset_models") / "refusals.txt").read_text(encoding="utf-8")
    else:
        try:
            text = read_text(Path(source).expanduser())
        except OSError as error:
            raise DataError(
                f"the refusals {source} cannot be read: {error.strerror}", hint="give a text file, one refusal a line"
            ) from error
    found = tuple(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not found:
        raise DataError(f"the refusals {source} hold no line", hint=f"write one refusal a line, or take ours with --refusals {BUILT_IN}")
    return found


def refused(examples: Sequence[Example], refusals: Sequence[str], *, seed: int) -> list[Example]:
    """Each question with a refusal for its answer: all refusals in turn, in an order that the seed decides.

    Raises `DataError` for plain text, in which nothing is asked.
    """
    for example in examples:
        if example.plain:
            raise DataError(
                f"{example.place}: plain text asks nothing that could be refused", hint="give question and answer, or use ga or npo"
            )
    order = np.random.default_rng((seed, _STREAM)).permutation(len(refusals))
    return [Example(e.messages, refusals[order[at % len(order)]], e.place) for at, e in enumerate(examples)]
