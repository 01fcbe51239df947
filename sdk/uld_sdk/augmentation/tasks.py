"""What is still to be found for each row, and the rounds in which it is proposed, checked and kept."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from uld_offset_models.data import normalised
from uld_sdk.augmentation.checks import DUPLICATE

PARAPHRASES = ("paraphrased_question", "paraphrased_answer")
WRONG = "perturbed_answer"
NEIGHBOURS = ("neighbour_sense", "neighbour_field", "neighbour_people")


@dataclass
class Task:
    """So many texts of one kind for one row. `taken` holds normalised texts that may not come again, shared with other tasks."""

    kind: str
    place: str
    question: str
    answer: str
    wanted: int
    check: Callable[[str], str | None]
    taken: set[str]
    kept: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def lacking(self) -> int:
        """How many are still to be found."""
        return self.wanted - len(self.kept)

    def take(self, candidates: Iterable[str]) -> None:
        """Keep candidates that pass, as far as they are wanted, and count why others do not."""
        for candidate in candidates:
            if self.lacking <= 0:
                return
            form = normalised(candidate)
            reason = self.check(candidate) or (DUPLICATE if form in self.taken else None)
            if reason is not None:
                self.refused[reason] += 1
                continue
            self.taken.add(form)
            self.kept.append(candidate)


class Proposer(Protocol):
    """Where texts come from: a server, or rules."""

    async def propose(self, tasks: Sequence[Task], attempt: int) -> list[list[str]]:
        """Candidates for each task, other ones at another attempt."""

    async def answers(self, questions: Sequence[str]) -> list[str]:
        """The answers to neighbours; an empty one where there is none."""


async def fill(tasks: Sequence[Task], proposer: Proposer, *, tries: int) -> None:
    """Propose and check until nothing is lacking, at most `tries` times.

    All rows are asked together and judged in their order, so that the outcome does not depend on which reply came first.
    """
    for attempt in range(tries):
        open_tasks = [task for task in tasks if task.lacking > 0]
        if not open_tasks:
            return
        for task, candidates in zip(open_tasks, await proposer.propose(open_tasks, attempt), strict=True):
            task.take(candidates)
