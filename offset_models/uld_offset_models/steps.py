"""Which rows each training step sees: a function of seed and step number alone, so that a resumed run sees the same."""

from collections.abc import Sequence

import numpy as np
import torch

from uld_adapters.errors import UsageError
from uld_offset_models.encoding import Encoded
from uld_offset_models.packing import Pack, pack


class Steps(torch.utils.data.Dataset[Pack]):
    """Item i is step `first` + i: `batch` forget rows and as many retain rows, each set reshuffled when it has been used up.

    With several processes each packs its own rows of the step, and the totals are those of all. An empty set gives no rows.
    """

    def __init__(
        self,
        forget: Sequence[Encoded],
        retain: Sequence[Encoded],
        *,
        batch: int,
        seed: int,
        first: int,
        last: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if min(batch, *(len(rows) for rows in (forget, retain) if rows)) < world:
            raise UsageError(f"{world} processes need at least {world} rows a step", hint="raise --batch-size or start fewer processes")
        self.sets = (forget, retain)
        self.batch, self.seed, self.first, self.last, self.rank, self.world = batch, seed, first, last, rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, index: int) -> Pack:
        chosen = self.chosen(index)
        totals = tuple(sum(len(row.ids) - row.start for row in rows) for rows in chosen)
        forget, retain = (rows[self.rank :: self.world] for rows in chosen)
        return pack(forget, retain, totals=(totals[0], totals[1]))

    def chosen(self, index: int) -> tuple[list[Encoded], list[Encoded]]:
        """The forget and the retain rows of an item, those of all processes."""
        return self._rows(0, self.first + index), self._rows(1, self.first + index)

    def _rows(self, stream: int, step: int) -> list[Encoded]:
        rows = self.sets[stream]
        batch = min(self.batch, len(rows))
        places = range(step * batch, (step + 1) * batch)
        orders = {
            epoch: np.random.default_rng((self.seed, stream, epoch)).permutation(len(rows)) for epoch in {p // len(rows) for p in places}
        }
        return [rows[orders[p // len(rows)][p % len(rows)]] for p in places]
