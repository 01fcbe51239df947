"""One spelling a token, for remotes whose tokenizer nobody knows: their tokens are bytes, and nothing tells where texts are cut.

The small model's probability of a token is that of the token's bytes in the small model's own spelling of the text. It conditions
on splits that the small model may never have seen, so it is approximate, and no bound is known.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from uld_adapters.vocabulary.bridge import Path, Place, Rows, beginnings
from uld_adapters.vocabulary.control import matched
from uld_adapters.vocabulary.cover import Covers
from uld_adapters.vocabulary.shares import Shares
from uld_adapters.vocabulary.tally import LEAST
from uld_adapters.vocabulary.tokens import Vocabulary


class SinglePath:
    """What `Bridge` does, with the bytes of the remote's tokens alone."""

    def __init__(self, remote: Vocabulary, small: Vocabulary) -> None:
        self.vocabulary, self.small = remote, Covers(small)
        self.control = matched(remote.roles, small.roles, remote.tokens, small.tokens)
        self.rows = small.rows

    def start(self) -> Place:
        """The place at the start of a text."""
        return Place(self.small.spelling.start, b"")

    def begin(self, text: bytes) -> tuple[Path, Place]:
        """The place after a text that is known, such as a prompt without a template."""
        certain, tail = self.small.advance(self.start().tail, self.small.written(text))
        return certain, Place(tail, b"")

    def step(self, place: Place, token: int) -> tuple[Path, Place]:
        """Go on by one of the remote's tokens: the small model's tokens that are certain by now, and the new place."""
        if token in self.vocabulary.control:
            end = (self.control[token],) if token in self.control else ()
            return (*self.small.path(place.tail), *end), Place(b"", b"")
        certain, tail = self.small.advance(place.tail, self.small.written(self.vocabulary.tokens[token]))
        return certain, Place(tail, b"")

    def ends(self, place: Place) -> list[Path]:
        """The one path at which the small model stands when the prefix ends."""
        return [self.small.path(place.tail)]

    def cover(self, place: Place) -> list[Path]:
        """The same, and the paths that lead there."""
        return beginnings(self.ends(place))

    def nodes(self, place: Place, candidates: Sequence[int], rows: Rows, *, ahead: Iterable[int] = (), least: float = LEAST) -> set[Path]:
        """The paths below those of `cover` whose rows `read` needs."""
        spelled = [self._spelled(place, token) for token in candidates]
        return {path[:size] for path in spelled for size in range(len(path))} - rows.keys()

    def _spelled(self, place: Place, token: int) -> Path:
        if token in self.vocabulary.control:
            own = self.small.path(place.tail)
            return (*own, self.control[token]) if token in self.control else own
        return self.small.path(place.tail + self.small.written(self.vocabulary.tokens[token]))

    def read(self, place: Place, candidates: Sequence[int], rows: Rows, *, least: float = LEAST) -> Shares:
        """The ratio of the text's probability with each candidate to that without; anything from 0 to 1 is possible."""
        models = next(iter(rows.values())).shape[0] + 1

        def weight(path: Path) -> np.ndarray:
            steps = [np.append(rows[path[:size]][:, path[size]], 1 / self.rows) for size in range(len(path))]
            return np.sum(np.log(steps), axis=0) if steps else np.zeros(models)

        with np.errstate(divide="ignore", invalid="ignore"):
            whole = weight(self.small.path(place.tail))
            ratios = [np.exp(np.minimum(weight(self._spelled(place, token)) - whole, 0.0)) for token in candidates]
        found = np.nan_to_num(np.stack(ratios, 1)) if ratios else np.empty((models, 0))
        neutral = np.array([token in self.vocabulary.control and token not in self.control for token in candidates], dtype=bool)
        neutral |= np.array([not self.small.written(self.vocabulary.tokens[token]) for token in candidates], dtype=bool)
        zero, one = np.zeros_like(found), np.ones_like(found)
        path = self.small.path(place.tail)
        return Shares(found, zero, one, neutral, (), ((path, np.ones(models)),))
