"""A pair in training against a target of another vocabulary: the ensemble is over the target's tokens, by the terms of a bridge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.bridged_rows import BridgedRow, tree_pack
from uld_offset_models.bridged_target import side_by_side
from uld_offset_models.encoding import Encoded
from uld_offset_models.offset import OffsetPair
from uld_offset_models.offset_lessons import OffsetLesson, OffsetLessons
from uld_offset_models.steps import Steps
from uld_offset_models.target_logits import Support


class BridgedLessons(OffsetLessons):
    """Lessons whose rows are trees."""

    def lesson(self, taught: Sequence[Encoded], retain: Sequence[Encoded], shares: tuple[float, float]) -> OffsetLesson:
        """A step of these rows."""
        rows: list[BridgedRow] = self.target.read([*taught, *retain])
        trees = [(row.tree, row.nodes) for row in rows]
        step = tree_pack(trees, [len(row.target) for row in rows], forget=len(taught))
        return OffsetLesson(pack=step, forget_rows=len(taught), reference=None, states=None, shares=shares, known=rows)


class BridgedPair(OffsetPair):
    """An `OffsetPair` whose change is c (log s_o' - log s_o) of the target's tokens, 0 for those that the small models cannot tell.

    The losses are over the candidates that the target told of; `target` is a `BridgedTarget`.
    """

    def compared(self, lesson: OffsetLesson) -> tuple[Support, Float[Tensor, "tokens candidates"]]:
        """What the target says at the lesson's answer positions, a constant, and the change there."""
        rows: list[BridgedRow] = lesson.known
        hidden = self.hidden(lesson.pack)
        support = self.target.support(rows, lesson.pack.labels.to(hidden.device), _nothing)
        changes = []
        for row, states in zip(rows, torch.split(hidden, [len(row.nodes) for row in rows]), strict=True):
            change = row.scores(states, self.head).float() - row.frozen.to(states.device)
            if self.gate is not None:
                change = row.gate(self.gate(states)) * change
            changes.append(torch.where(row.known.to(states.device), change, torch.zeros_like(change)))
        return support, side_by_side(changes, 0.0)

    def lessons(self, steps: Steps, refusals: Mapping[Encoded, Encoded]) -> BridgedLessons:
        """The lessons of the steps."""
        return BridgedLessons(steps, self.goal, refusals, self.target, {})


def _nothing() -> Any:
    raise ValueError("the candidates of another vocabulary have no frozen logits")
