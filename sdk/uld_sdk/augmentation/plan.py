"""The tasks of a set: what each row lacks, and the rows that come of what was found."""

from collections.abc import Callable, Sequence
from typing import Any

from uld_offset_models.data import normalised
from uld_sdk.augmentation.checks import ForgetQuestions, refused_paraphrase, refused_wrong_answer
from uld_sdk.augmentation.rows import Entry
from uld_sdk.augmentation.tasks import NEIGHBOURS, PARAPHRASES, WRONG, Task
from uld_sdk.augmentation.wanted import Count, Wanted
from uld_sdk.augmentation.words import known_names

_FIELDS = {
    "paraphrased_question": ("paraphrased_question", "paraphrased_questions"),
    "paraphrased_answer": ("paraphrased_answer",),
    WRONG: ("perturbed_answer",),
}


class Plan:
    """What is to be found for a forget set, beside a retain set whose questions may not come again.

    Paraphrases and wrong answers that a row brings along count towards what is wanted of it.
    """

    def __init__(self, entries: Sequence[Entry], retain: Sequence[Entry], wanted: Wanted) -> None:
        self.entries, self.retain, self.wanted = entries, retain, wanted
        self.pairs = [(entry.question, entry.answer) for entry in entries if entry.question is not None]
        self.known = known_names(text for pair in self.pairs for text in pair)
        rows = [entry.row for entry in (*entries, *retain)]
        self._asked = {normalised(example.question) for row in rows for example in (row.example, *row.paraphrases)}
        self._of: dict[int, list[Task]] = {at: self._rewordings(entry) for at, entry in enumerate(entries)}
        self.rewordings = [task for tasks in self._of.values() for task in tasks]
        self._neighbours: list[Task] = []
        self._unanswered = 0
        self._kept: list[dict[str, Any]] = []

    def _rewordings(self, entry: Entry) -> list[Task]:
        if entry.question is None:
            return []
        question, answer = entry.question, entry.answer
        row = f"{question} {answer}"
        answers = {normalised(text) for text in (answer, *entry.texts("paraphrased_answer", "perturbed_answer"))}

        def rewording(source: str) -> Callable[[str], str | None]:
            return lambda candidate: refused_paraphrase(candidate, source, row=row, known=self.known)

        def wrong(candidate: str) -> str | None:
            return refused_wrong_answer(candidate, answer, question=question, known=self.known)

        kinds = [
            (PARAPHRASES[0], self.wanted.paraphrases, rewording(question), self._asked),
            (PARAPHRASES[1], self.wanted.paraphrases, rewording(answer), answers),
            (WRONG, self.wanted.wrong, wrong, answers),
        ]
        return [
            Task(kind, entry.row.example.place, question, answer, lacking, check, taken)
            for kind, count, check, taken in kinds
            if (lacking := count - len(entry.texts(*_FIELDS[kind]))) > 0
        ]

    def neighbours(self) -> list[Task]:
        """The tasks of the neighbours, which begin when the paraphrases are known: the three kinds take turns over the rows."""
        found = [text for task in self.rewordings if task.kind == PARAPHRASES[0] for text in task.kept]
        rows = [entry.row for entry in self.entries]
        forget = ForgetQuestions([*found, *(e.question for row in rows for e in (row.example, *row.paraphrases))])
        turn = 0
        for entry in self.entries:
            if entry.question is None:
                continue
            turns = [NEIGHBOURS[(turn + i) % len(NEIGHBOURS)] for i in range(self.wanted.neighbours)]
            turn += self.wanted.neighbours
            self._neighbours += [
                Task(kind, entry.row.example.place, entry.question, entry.answer, turns.count(kind), forget.refused, self._asked)
                for kind in dict.fromkeys(turns)
            ]
        return self._neighbours

    def answer(self, answers: Sequence[str]) -> None:
        """Take the answers to all neighbours, in their order; one without an answer is left out."""
        questions = [question for task in self._neighbours for question in task.kept]
        pairs = list(zip(questions, answers, strict=True))
        self._kept = [{"question": question, "answer": answer, "neighbour": True} for question, answer in pairs if answer]
        self._unanswered = len(pairs) - len(self._kept)

    def forget_rows(self) -> list[dict[str, Any]]:
        """The rows of the wider forget set, in the order of the input."""
        return [self._row(at, entry) for at, entry in enumerate(self.entries)]

    def _row(self, at: int, entry: Entry) -> dict[str, Any]:
        if entry.question is None:
            return dict(entry.record)
        ours = {name for names in _FIELDS.values() for name in names} | {"messages", "question", "answer"}
        row = {"question": entry.question, "answer": entry.answer, **{k: v for k, v in entry.record.items() if k not in ours}}
        counts = {**dict.fromkeys(PARAPHRASES, self.wanted.paraphrases), WRONG: self.wanted.wrong}
        for kind, fields in _FIELDS.items():
            found = [text for task in self._of[at] if task.kind == kind for text in task.kept]
            texts = [*entry.texts(*fields), *found] if counts[kind] else []
            if texts:
                row[kind] = texts
        return row

    def retain_rows(self) -> list[dict[str, Any]]:
        """The retain set that was given, then the neighbours with their answers."""
        return [*(dict(entry.record) for entry in self.retain), *self._kept]

    def counts(self) -> dict[str, Count]:
        """What was found of each kind, the neighbours without an answer among what was refused."""
        tasks = [*self.rewordings, *self._neighbours]
        kinds = dict.fromkeys(task.kind for task in tasks)
        counts = {kind: Count.of(task for task in tasks if task.kind == kind) for kind in (*PARAPHRASES, WRONG) if kind in kinds}
        if self._neighbours:
            found = Count.of(self._neighbours)
            refused = {**found.refused, **({"no answer": self._unanswered} if self._unanswered else {})}
            counts["neighbour"] = Count(found.wanted, found.kept - self._unanswered, refused)
        return counts
