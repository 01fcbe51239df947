"""Texts by rules, without any server: questions and answers in frames, names and numbers swapped within the set.

Everything is a function of the rows and the seed.
"""

import random
import re
from collections.abc import Callable, Sequence

from uld_sdk.augmentation.prompts import wording
from uld_sdk.augmentation.tasks import NEIGHBOURS, Task
from uld_sdk.augmentation.words import Span, content, name_spans, names, number_spans, numbers, words

_WHO_DOES = re.compile(
    r"who (?!is |are |was |were |do |does |did |has |have |had |can |could |will |would |should |may |might )[^?.!]+\?", re.I
)
_WHAT_IS = re.compile(r"(what|who) (is|are|was|were) ((?:the|a|an) [^?.!,]+)\?", re.I)
_WHEN_WAS = re.compile(r"(when|where|why|how) (is|are|was|were) ([^?.!,]+)\?", re.I)
# Words after which "is" cannot stand: "what the river called is".
_NO_END = re.compile(r"(?:(?:ed|en|ing)|\b(?:about|at|born|by|called|doing|done|for|from|in|known|like|made|of|on|said|to|with))$")


_MONTHS = "January February March April May June July August September October November December".split()


class Rules:
    """A proposer that needs no server. `known` are the names of the set, `rows` its questions and answers."""

    def __init__(self, rows: Sequence[tuple[str, str]], known: frozenset[str], *, seed: int) -> None:
        self.known, self.seed = known, seed
        self._answers = list(dict.fromkeys(answer for _, answer in rows))
        texts = [text for row in rows for text in row]
        found = dict.fromkeys(span.text for text in texts for span in name_spans(text, known))
        self._names = [name for name in found if name not in _MONTHS]
        self._numbers = list(dict.fromkeys(span.text for text in texts for span in number_spans(text)))
        self._told: dict[str, str] = {}

    async def propose(self, tasks: Sequence[Task], attempt: int) -> list[list[str]]:
        """All candidates at the first attempt; rules have no second thoughts."""
        return [self._candidates(task) if attempt == 0 else [] for task in tasks]

    async def answers(self, questions: Sequence[str]) -> list[str]:
        """The answers that belong to the templates of the neighbours."""
        return [self._told.get(question, "") for question in questions]

    def _candidates(self, task: Task) -> list[str]:
        draw = random.Random(f"{self.seed}|{task.kind}|{task.question}|{task.answer}")
        makers: dict[str, Callable[[Task, random.Random], list[str]]] = {
            "paraphrased_question": self._questions,
            "paraphrased_answer": self._rephrased,
            "perturbed_answer": self._wrong,
        }
        return makers.get(task.kind, self._neighbours)(task, draw)

    def _questions(self, task: Task, draw: random.Random) -> list[str]:
        clause = self._clause(task.question)
        framed = [] if clause is None else [frame.format(clause=clause) for frame in wording("templates")["frames"]]
        plain = [template.format(question=task.question) for template in wording("templates")["questions"]]
        return [*_shuffled(framed, draw), *_shuffled(plain, draw)]

    def _clause(self, question: str) -> str | None:
        """The question as part of a sentence: "Who opens the shop?" as "who opens the shop"."""
        if _WHO_DOES.fullmatch(question):
            return question[0].lower() + question[1:-1]
        if (match := _WHAT_IS.fullmatch(question)) and not _NO_END.search(match[3]):
            return f"{match[1].lower()} {match[3]} {match[2]}"
        if match := _WHEN_WAS.fullmatch(question):
            first = next(iter(name_spans(f"x {match[3]}", self.known)), None)
            if first is not None and first.start == 2:  # a name, and then what was done to it: "Isaac Newton" "born"
                named, rest = match[3][: first.end - 2], match[3][first.end - 2 :]
                if re.fullmatch(r"(?: \w+)?", rest):
                    return f"{match[1].lower()} {named} {match[2]}{rest}"
        return None

    def _rephrased(self, task: Task, draw: random.Random) -> list[str]:
        return _shuffled([template.format(answer=task.answer) for template in wording("templates")["answers"]], draw)

    def _wrong(self, task: Task, draw: random.Random) -> list[str]:
        """The answer with one name or number of the set for another, then with changed numbers, then the answers of other rows."""
        given, answer = words(task.question), task.answer
        swaps = [
            _put(answer, span, other)
            for span in name_spans(answer, self.known)
            if not words(span.text) <= given
            for other in (_MONTHS if span.text in _MONTHS else self._names)
            if not words(other) & words(span.text)
        ]
        figures = [span for span in number_spans(answer) if span.text not in given]
        swaps += [_put(answer, span, other) for span in figures for other in self._numbers if _alike(other, span.text)]
        changed = [_put(answer, span, _changed(span.text, draw)) for span in figures for _ in range(task.wanted)]
        others = [other for other in self._answers if other != answer]
        return [*_shuffled(swaps, draw), *changed, *_shuffled(others, draw)]

    def _neighbours(self, task: Task, draw: random.Random) -> list[str]:
        """Questions about the row's names and numbers as nothing but words and figures; each kind has a share of them."""
        text = f"{task.question} {task.answer}"
        listed = [word for span in name_spans(text, self.known) for word in span.text.split()]
        terms = [*listed, *sorted(word for word in content(task.question) - names(text, self.known) if word.isalpha() and len(word) > 3)]
        pairs = [
            (asked.format(word=word), told.format(word=word, **_spelling(word)))
            for word in dict.fromkeys(terms)
            for asked, told in wording("templates")["words"]
        ]
        for number in sorted(number for number in numbers(text) if number.isdecimal() and len(number) < 19):
            value = {"number": number, "after": int(number) + 1, "before": int(number) - 1, "double": 2 * int(number)}
            pairs += [(asked.format(**value), told.format(**value)) for asked, told in wording("templates")["numbers"]]
        self._told.update(pairs)
        return _shuffled([asked for asked, _ in pairs], draw)[NEIGHBOURS.index(task.kind) :: len(NEIGHBOURS)]


def _shuffled(texts: Sequence[str], draw: random.Random) -> list[str]:
    return draw.sample(list(texts), len(texts))


def _put(text: str, span: Span, other: str) -> str:
    return text[: span.start] + other + text[span.end :]


def _alike(number: str, other: str) -> bool:
    return number != other and len(number) == len(other)


def _changed(number: str, draw: random.Random) -> str:
    """Another number of the same form: one of its digits, of a long one among the last two, is another digit."""
    places = [at for at, digit in enumerate(number) if digit.isdecimal()][-2:]
    at = draw.choice(places)
    lowest = 1 if at == 0 else 0
    return number[:at] + draw.choice([digit for digit in "0123456789"[lowest:] if digit != number[at]]) + number[at + 1 :]


def _spelling(word: str) -> dict[str, str | int]:
    return {"length": len(word), "first": word[0], "last": word[-1], "spelled": "-".join(word), "capitals": word.upper()}
