"""Tokens by their bytes, for servers that tell bytes or strings instead of ids."""

from collections.abc import Callable, Iterator

from uld_adapters.vocabulary.tokens import Vocabulary


class TokensByBytes:
    """Finds a vocabulary's tokens by what they spell; of tokens with the same bytes the first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._text: dict[bytes, int] = {}
        self._control: dict[bytes, int] = {}
        for token, data in enumerate(vocabulary.tokens):
            (self._control if token in vocabulary.control else self._text).setdefault(data, token)

    def find(self, data: bytes) -> int | None:
        """The token with these bytes, else the control token of this name, else None."""
        return self._text.get(data, self._control.get(data))

    def text(self, data: bytes) -> int | None:
        """The token with these bytes that is no control token."""
        return self._text.get(data)

    def spelling(self, token: int) -> bytes:
        """What a token adds to a text: nothing for a control token."""
        return b"" if token in self.vocabulary.control else self.vocabulary.tokens[token]

    def only_split(self, data: bytes, count: int, fits: Callable[[bytes, bytes], bool]) -> tuple[list[int] | None, int]:
        """The one way to write bytes in `count` tokens, and how many ways there are (counted up to 2).

        `fits(done, piece)` says whether a token with the bytes `piece` may stand after the bytes `done`.
        """
        ways: list[list[int]] = []
        for way in self._splits(data, count, fits, b""):
            ways.append(way)
            if len(ways) == 2:
                break
        return (ways[0] if len(ways) == 1 else None), len(ways)

    def _splits(self, rest: bytes, count: int, fits: Callable[[bytes, bytes], bool], done: bytes) -> Iterator[list[int]]:
        if not count:
            if not rest:
                yield []
            return
        for size in range(1, len(rest) + 1):
            token = self._text.get(rest[:size])
            if token is not None and fits(done, rest[:size]):
                for way in self._splits(rest[size:], count - 1, fits, done + rest[:size]):
                    yield [token, *way]
