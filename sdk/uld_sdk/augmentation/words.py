"""What a text holds in numbers, names and content words: the marks by which rewordings and wrong answers are judged.

Names are read from capitals, which is right for most languages that have them; where every noun has one, nouns count as names.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’\-][^\W\d_]+)*")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")
_STOP = frozenset(
    "a about after all also am an and any are as at be been before being both but by can could did do does down during each else ever "
    "for from had has have having he her here hers him his how i if in into is it its itself let me might more most must my of on "
    "only onto or other our out over own she should so some such than that the their theirs them then there these they this those "
    "through to too under until up upon us very was we were what when where which while who whom whose why will with would you your th st "
    "please tell know".split()
)
# Words that begin a sentence with a capital and are no names even before one: "Describe Isaac Newton."
_OPENERS = _STOP | frozenset(
    "yes no not may shall compare define describe discuss explain give identify list mention name outline say state summarise summarize "
    "although because since though despite according did one".split()
)
_PRONOUN = frozenset({"i", "i'm", "i'd", "i'll", "i've", "i’m", "i’d", "i’ll", "i’ve"})
# Not "one", which is a pronoun as often as a number.
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
        2,
    )
} | {word: str(10 * tens) for tens, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety hundred".split(), 2)}


@dataclass(frozen=True)
class Span:
    """A stretch of a text, from `start` to `end` in characters."""

    start: int
    end: int
    text: str


def words(text: str) -> frozenset[str]:
    """Every word and number of a text in lower case, without possessive endings."""
    return frozenset(_plain(match.group()) for match in _WORD.finditer(text))


def numbers(text: str) -> frozenset[str]:
    """The numbers of a text as digits; "two" counts as 2, and 1,000 as 1000."""
    found = (_plain(match.group()) for match in _WORD.finditer(text))
    return frozenset(_NUMBER_WORDS.get(word, word) for word in found if word[0].isdigit() or word in _NUMBER_WORDS)


def number_spans(text: str) -> list[Span]:
    """Where a text writes numbers in digits."""
    return [Span(match.start(), match.end(), match.group()) for match in _WORD.finditer(text) if match.group()[0].isdigit()]


@lru_cache(maxsize=65_536)  # a large set compares every question with every other
def content(text: str) -> frozenset[str]:
    """The words of a text that carry its meaning; numbers in one form."""
    return frozenset(_NUMBER_WORDS.get(word, word) for word in words(text) if word not in _STOP)


def stems(text: str) -> frozenset[str]:
    """The beginnings of content words, by which forms of one word are alike; of scripts that put no spaces, the characters."""
    return frozenset(stem for word in content(text) or words(text) for stem in (word if word[0] > "\u2e7f" else [word[:4]]))


def names(text: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """The words of the names of a text in lower case; `known` are names that count at the beginning of a sentence, too."""
    return frozenset(word for span in name_spans(text, known) for word in words(span.text))


def known_names(texts: Iterable[str]) -> frozenset[str]:
    """Names that stand inside a sentence in any of the texts."""
    return frozenset(word for text in texts for word in names(text))


def name_spans(text: str, known: frozenset[str] = frozenset()) -> list[Span]:
    """The names of a text as they are written, words of one name in one span, without possessive endings."""
    matches = list(_WORD.finditer(text))
    shouted = not any(match.group()[0].islower() for match in matches)
    spans: list[Span] = []
    for at, match in enumerate(matches):
        word = match.group()
        plain = _plain(word)
        if not word[0].isupper() or plain in _PRONOUN:
            continue
        if _begins(text, match.start()) and (plain in _OPENERS or not (plain in known or shouted or _leads(text, matches, at))):
            continue
        end = match.start() + len(_bare(word))
        if spans and text[spans[-1].end : match.start()] == " ":
            spans[-1] = Span(spans[-1].start, end, text[spans[-1].start : end])
        else:
            spans.append(Span(match.start(), end, text[match.start() : end]))
    return spans


def _leads(text: str, matches: list[re.Match[str]], at: int) -> bool:
    """Whether the next word goes on with a capital, right after a space: the first word of "Isaac Newton was born"."""
    following = matches[at + 1] if at + 1 < len(matches) else None
    return following is not None and following.group()[0].isupper() and text[matches[at].end() : following.start()] == " "


def _begins(text: str, start: int) -> bool:
    before = text[:start].rstrip(" \t\"'“”‘’«»([*_")
    return not before or before[-1] in ".?!:;…\n"


def _bare(word: str) -> str:
    return word[:-2] if len(word) > 2 and word[-2] in "'’" and word[-1] in "sS" else word


def _plain(word: str) -> str:
    return _THOUSANDS.sub("", word) if word[0].isdigit() else _bare(word).casefold()
