"""The steps of training by preference: packed rows with the refusals that belong to them, and what the reference says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.encoding import Encoded
from uld_offset_models.goal import Goal
from uld_offset_models.packing import Pack, pack
from uld_offset_models.steps import Steps


@dataclass(frozen=True)
class Reference:
    """P_ref on the training rows: log P_ref(y|x) in nats of forget rows, final hidden states (tokens, width) of retain rows.

    A hidden state at an answer position stands for the whole distribution there, in a fraction of the room that its logits take.
    """

    answers: Mapping[Encoded, float] = field(default_factory=dict)
    states: Mapping[Encoded, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lesson:
    """One step: `pack` holds the forget rows (for `dpo` answers, then refusals), then the retain rows.

    `reference` is log P_ref of each forget row, `states` are the reference's hidden states at the retain answers' positions. This
    process's mean losses times `shares` (forget, retain) add up over all processes to the means of the step.
    """

    pack: Pack
    forget_rows: int
    reference: Float[Tensor, " answers"] | None
    states: Float[Tensor, "tokens width"] | None
    shares: tuple[float, float]


class Lessons(torch.utils.data.Dataset[Lesson]):
    """Item i is item i of `steps`, seen by one of their processes; `refusals` maps each forget row to the refusal of its question."""

    def __init__(self, steps: Steps, goal: Goal, refusals: Mapping[Encoded, Encoded], reference: Reference) -> None:
        self.steps, self.goal, self.refusals, self.reference = steps, goal, refusals, reference

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Lesson:
        taught, retain, shares = self.dealt(index)
        answers, states = self.reference.answers, self.reference.states
        return Lesson(
            pack=pack(taught, retain),
            forget_rows=len(taught),
            reference=torch.tensor([answers[row] for row in taught]) if self.goal.by_sequence else None,
            states=torch.cat([states[row] for row in retain]) if self.goal.retain == "kl" else None,
            shares=shares,
        )

    def dealt(self, index: int) -> tuple[list[Encoded], list[Encoded], tuple[float, float]]:
        """The rows of this process that the forget and the retain objective read, and its shares of the step's means."""
        everyone = self.steps.chosen(index)
        forget, retain = (rows[self.steps.rank :: self.steps.world] for rows in everyone)
        taught = self._taught(forget)
        if self.goal.by_sequence:
            share = len(forget) / len(everyone[0])
        else:
            share = _tokens(taught) / _tokens(self._taught(everyone[0]))
        return taught, retain, (share, _tokens(retain) / _tokens(everyone[1]) if retain else 0.0)

    def rows(self) -> tuple[list[Encoded], list[Encoded]]:
        """Every forget row (refusals included) and retain row of the steps, once: what the reference has to know."""
        wanted = [len(set(rows)) for rows in self.steps.sets]
        seen: list[dict[Encoded, None]] = [{}, {}]
        for index in range(len(self)):
            for found, rows in zip(seen, self.steps.chosen(index), strict=True):
                found.update(dict.fromkeys(rows))
            if [len(found) for found in seen] == wanted:
                break
        return list(dict.fromkeys(self._taught(list(seen[0])))), list(seen[1])

    def _taught(self, forget: Sequence[Encoded]) -> list[Encoded]:
        """The rows that the forget objective reads."""
        refusals = [self.refusals[row] for row in forget] if self.goal.refuses else []
        return refusals if self.goal.forget == "relabel" else [*forget, *refusals]


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.ids) - row.start for row in rows)
