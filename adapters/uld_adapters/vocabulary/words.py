"""Bytes as text, and text cut into the words within which a tokenizer spells."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Protocol
from unicodedata import category

from uld_adapters.errors import UsageError

_UNREADABLE = 0xF700  # bytes that are no UTF-8 stand as private characters, one each
_SMALLEST = {0xE0: b"\xa0", 0xF0: b"\x90"}  # second bytes below these are no UTF-8


class Words(Protocol):
    """How a tokenizer cuts texts into the words within which it spells."""

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        ...

    def divides(self, text: str, at: int) -> bool:
        """Whether one word ends and another begins at a place inside the text."""
        ...


def utf8(text: str, *, what: str) -> bytes:
    """A text as bytes; raises `UsageError`, which names it, for half of a surrogate pair, that no UTF-8 has."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not valid Unicode: the character at place {error.start}, U+{ord(text[error.start]):04X}, is a lone surrogate",
            hint="decode it as UTF-8 first, as in data.decode('utf-8', 'replace')",
        ) from error


def ends_inside_character(data: bytes) -> bool:
    """Whether the bytes stop in the middle of a UTF-8 character."""
    return unfinished(data) > 0


def unfinished(data: bytes) -> int:
    """How many bytes of an unfinished character stand at the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        width = 4 if byte >> 3 == 0b11110 else 3 if byte >> 4 == 0b1110 else 2 if byte >> 5 == 0b110 else 1
        return back if width > back and completions(bytes(data[-back:])) else 0
    return 0


def readable(data: bytes) -> tuple[str, list[int]]:
    """The bytes as text, and how many bytes each character stands for.

    An unfinished character at the end stands as the first one that it may become, any other byte that is no UTF-8 as a
    private character.
    """
    open_ = unfinished(data)
    head, tail = (data[:-open_], data[-open_:]) if open_ else (data, b"")
    try:
        text = head.decode()
        widths = [len(c.encode()) for c in text] if len(text) != len(head) else [1] * len(text)
    except UnicodeDecodeError:
        text = head.decode(errors="surrogateescape")
        widths = [1 if "\udc80" <= c <= "\udcff" else len(c.encode()) for c in text]
        text = "".join(chr(_UNREADABLE + ord(c) - 0xDC00) if "\udc80" <= c <= "\udcff" else c for c in text)
    if tail:
        lead = tail[0]
        second = tail[1:2] or _SMALLEST.get(lead, b"\x80")
        width = 4 if lead >> 3 == 0b11110 else 3 if lead >> 4 == 0b1110 else 2
        try:
            text += (tail[:1] + second + tail[2:]).ljust(width, b"\x80").decode()
            widths.append(open_)
        except UnicodeDecodeError:
            text += "".join(chr(_UNREADABLE + byte) for byte in tail)
            widths += [1] * open_
    return text, widths


@lru_cache(maxsize=4096)
def completions(lead: bytes) -> tuple[str, ...]:
    """Characters that begin with the bytes of an unfinished one: one of each Unicode category, and a space if there is one.

    None where no character begins like this.
    """
    width = 4 if lead[0] >> 3 == 0b11110 else 3 if lead[0] >> 4 == 0b1110 else 2
    low = lead + b"\x80" * (width - len(lead))
    high = lead + b"\xbf" * (width - len(lead))
    first, last = _code_point(low), min(_code_point(high), 0x10FFFF)
    found: dict[tuple[str, bool], str] = {}
    for code in range(max(first, {2: 0x80, 3: 0x800, 4: 0x10000}[width]), last + 1):
        if not 0xD800 <= code <= 0xDFFF:
            char = chr(code)
            found.setdefault((category(char), char.isspace()), char)
    return tuple(found.values())


def _code_point(data: bytes) -> int:
    value = data[0] & (0x7F >> len(data))
    for byte in data[1:]:
        value = value << 6 | byte & 0x3F
    return value


class _Whole:
    """No cuts: a text is one word."""

    def __call__(self, text: str) -> list[str]:
        return [text] if text else []

    def divides(self, text: str, at: int) -> bool:
        return False


whole: Words = _Whole()


class Pattern:
    """Words by a regular expression; what it leaves out stands as words of its own."""

    def __init__(self, pattern: str) -> None:
        import regex

        self._expression = regex.compile(pattern)

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        found, at = [], 0
        for match in self._expression.finditer(text):
            start, end = match.span()
            if start > at:
                found.append(text[at:start])
            if end > start:
                found.append(text[start:end])
            at = end
        return [*found, text[at:]] if at < len(text) else found

    def divides(self, text: str, at: int) -> bool:
        """Whether one word ends and another begins at a place inside the text, without a look at what comes after it."""
        before = 0
        for match in self._expression.finditer(text):
            start, end = match.span()
            if end > at:
                return at in (before, start)
            before = end
        return at == before


class Atoms:
    """Words of which some names are always words of their own, the longest first."""

    def __init__(self, words: Words, names: Iterable[str]) -> None:
        import regex

        self._words = words
        self._names = regex.compile("(" + "|".join(map(regex.escape, sorted(names, key=len, reverse=True))) + ")")

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        parts = enumerate(self._names.split(text))
        return [word for at, part in parts if part for word in ([part] if at % 2 else self._words(part))]

    def divides(self, text: str, at: int) -> bool:
        """Whether one word ends and another begins at a place inside the text."""
        return at in accumulate(map(len, self(text)))


class Neighbours:
    """Words of a tokenizer without cuts: no token reaches across two characters that stand side by side in none."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._pairs = {text[at : at + 2] for text in texts for at in range(len(text) - 1)}

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        places = [0, *(at for at in range(1, len(text)) if self.divides(text, at)), len(text)]
        return [text[begin:end] for begin, end in pairwise(places) if begin < end]

    def divides(self, text: str, at: int) -> bool:
        """Whether one word ends and another begins at a place inside the text."""
        return text[at - 1 : at + 1] not in self._pairs


def by_neighbours(tokens: Iterable[bytes]) -> Words:
    """For tokenizers without cuts; a text is one word where tokens end inside characters."""
    try:
        return Neighbours([token.decode() for token in tokens if len(token) > 1])
    except UnicodeDecodeError:
        return whole


class PreTokenizer:
    """Words by a pre-tokenizer of the `tokenizers` library, which sees spaces as `space`; what it leaves out goes to the word after it."""

    def __init__(self, pre_tokenizer: Any, *, space: str = " ") -> None:
        self._split, self._space = pre_tokenizer.pre_tokenize_str, space

    def _ends(self, text: str) -> list[int]:
        return [end for _, (_, end) in self._split(text.replace(" ", self._space))]

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        ends = self._ends(text)
        if not ends or ends[-1] < len(text):
            ends.append(len(text))
        return [text[begin:end] for begin, end in pairwise([0, *ends]) if end > begin]

    def divides(self, text: str, at: int) -> bool:
        """Whether one word ends and another begins at a place inside the text."""
        return at in self._ends(text)
