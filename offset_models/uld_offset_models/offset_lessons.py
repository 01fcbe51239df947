"""The steps of training a pair: packed rows with what the target and the frozen model, both of them constants, say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import Goal
from uld_offset_models.lessons import Lesson, Lessons, Reference
from uld_offset_models.packing import pack
from uld_offset_models.steps import Steps
from uld_offset_models.target_side import TargetSide


@dataclass(frozen=True)
class OffsetLesson(Lesson):
    """A step of a pair: `states` are o's hidden states at all answer positions, `known` is what the target side read of them."""

    known: Any


class OffsetLessons(Lessons):
    """Item i is item i of `steps`; `states` holds o's final hidden states (tokens, width) of every row."""

    def __init__(
        self, steps: Steps, goal: Goal, refusals: Mapping[Encoded, Encoded], target: TargetSide, states: Mapping[Encoded, Tensor]
    ) -> None:
        super().__init__(steps, goal, refusals, Reference(states=states))
        self.target = target

    def __getitem__(self, index: int) -> OffsetLesson:
        taught, retain, shares = self.dealt(index)
        return self.lesson(taught, retain, shares)

    def lesson(self, taught: Sequence[Encoded], retain: Sequence[Encoded], shares: tuple[float, float]) -> OffsetLesson:
        """A step of these rows."""
        rows = [*taught, *retain]
        return OffsetLesson(
            pack=pack(taught, retain),
            forget_rows=len(taught),
            reference=None,
            states=torch.cat([self.reference.states[row] for row in rows]),
            shares=shares,
            known=self.target.read(rows),
        )
