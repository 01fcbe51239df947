"""What a proposed text must pass before it is kept; each check says why not, or None."""

from collections.abc import Iterable

from uld_offset_models.data import normalised
from uld_sdk.augmentation.words import content, names, numbers, stems, words

DUPLICATE = "a duplicate"
_CLOSE = 0.7  # share of content words in common with a forget question, of all in either
_SLACK = 200  # characters by which any reply may be longer than four times its source


def refused_paraphrase(candidate: str, source: str, *, row: str, known: frozenset[str] = frozenset()) -> str | None:
    """Why a text is no paraphrase: it must keep the source's numbers and names, bring none that the row lacks, and speak of the row.

    `row` is question and answer together, `known` are the names of the whole set.
    """
    if reason := _unfit(candidate, source):
        return reason
    if normalised(candidate) == normalised(source):
        return "the source itself"
    if not numbers(source) <= numbers(candidate):
        return "a number is lost"
    if not numbers(candidate) <= numbers(row):
        return "a number is added"
    if not names(source, known) <= words(candidate):
        return "a name is lost"
    if not names(candidate) <= words(row):
        return "a name is added"
    if stems(row).isdisjoint(stems(candidate)):
        return "nothing in common"
    return None


def refused_wrong_answer(candidate: str, answer: str, *, question: str, known: frozenset[str] = frozenset()) -> str | None:
    """Why a text is no wrong answer: it must differ from the right one in substance, not in its wording alone.

    What the right answer tells are its numbers and names that the question does not give, or else its other content words. A
    wrong answer lacks some of that and says something else. One that denies the right answer in its own words is refused, too.
    """
    if reason := _unfit(candidate, answer):
        return reason
    if normalised(candidate) == normalised(answer):
        return "the right answer"
    told = (numbers(answer) | names(answer, known)) - words(question) - numbers(question)
    told = told or content(answer) - content(question) or content(answer)
    said = content(candidate)
    if told <= words(candidate) | numbers(candidate) or said <= content(answer):
        return "the same in substance"
    return None


class ForgetQuestions:
    """Questions that no neighbour may be, in their own or nearly the same words."""

    def __init__(self, questions: Iterable[str]) -> None:
        listed = list(questions)
        self._forms = {normalised(question) for question in listed}
        self._contents = {content(question) for question in listed}

    def refused(self, candidate: str) -> str | None:
        """Why a text is no question to keep."""
        if not candidate.rstrip("\"'”’ ").endswith(("?", "？", "؟")):
            return "no question"
        if len(candidate) > 4 * _SLACK:
            return "too long"
        if normalised(candidate) in self._forms:
            return "a forget question"
        mine = content(candidate)
        return "too near to a forget question" if any(_near(mine, theirs) for theirs in self._contents) else None


def _near(mine: frozenset[str], theirs: frozenset[str]) -> bool:
    """Whether content words are mostly the same, or all of a forget question's (if more than two) are there beside others."""
    common = len(mine & theirs)
    return common > 0 and (common >= _CLOSE * len(mine | theirs) or (len(theirs) > 2 and common == len(theirs)))


def _unfit(candidate: str, source: str) -> str | None:
    if not normalised(candidate):
        return "empty"
    return "too long" if len(candidate) > 4 * len(source) + _SLACK else None
