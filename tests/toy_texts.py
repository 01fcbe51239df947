"""Small models whose every text is known: distributions over finite sets of texts, told token by token."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from uld_adapters.vocabulary.bridge import Bridge, Place
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.shares import Shares
from uld_adapters.vocabulary.tokens import Vocabulary

Path = tuple[int, ...]


def toy_vocabulary(
    seed: int, *, alphabet: bytes = b"ab", size: int = 8, longest: int = 4, pattern: str | None = None, met: bool = False
) -> Vocabulary:
    """Random byte-pair tokens over an alphabet in random id order; the last id ends a text.

    With `met` every token is made of two that stand side by side in its text, as training makes them. Without it some are never
    merged and stand for whole words only, by tiktoken's rule: the next byte takes them apart.
    """
    rng = np.random.default_rng(seed)
    tokens = [bytes([byte]) for byte in alphabet]
    while len(tokens) < size:
        left, right = (tokens[int(i)] for i in rng.integers(0, len(tokens), 2))
        possible = len(left + right) <= longest and left + right not in tokens
        if possible and (not met or _meet(tokens, left, right)):
            tokens.append(left + right)
        elif rng.random() < 0.02:
            break
    order = rng.permutation(len(tokens))
    shuffled = [b""] * len(tokens)
    for rank, place in enumerate(order):
        shuffled[place] = tokens[rank]
    return Vocabulary.from_bytes(
        [*shuffled, b"<end>"], control={len(tokens): Role.END_OF_TEXT}, order=[int(i) for i in order], pattern=pattern, name=f"toy {seed}"
    )


def _meet(tokens: list[bytes], left: bytes, right: bytes) -> bool:
    """Whether the tokens so far, told in the order of their merges, leave these two side by side."""
    vocabulary = Vocabulary.from_bytes(tokens, order=range(len(tokens)))
    return vocabulary.encode(left + right) == [tokens.index(left), tokens.index(right)]


def random_texts(seed: int, alphabet: bytes = b"ab", longest: int = 7) -> dict[bytes, float]:
    """A weight for every text over the alphabet: few are likely, all are possible."""
    rng = np.random.default_rng(seed)
    texts = [bytes(letters) for size in range(longest + 1) for letters in itertools.product(alphabet, repeat=size)]
    weights = np.exp(3 * rng.normal(size=len(texts))) * np.array([len(alphabet) ** -len(text) for text in texts])
    return dict(zip(texts, weights / weights.sum(), strict=True))


class TextModel:
    """P(text) for a finite set of texts, as a model of a vocabulary's canonical spelling: it depends on all of the history."""

    def __init__(self, vocabulary: Vocabulary, texts: Mapping[bytes, float]) -> None:
        self.vocabulary, self.texts = vocabulary, texts
        end = next(i for i, role in vocabulary.roles.items() if role is Role.END_OF_TEXT)
        self.mass: dict[Path, float] = defaultdict(float)
        for text, weight in texts.items():
            path = (*vocabulary.encode(_begun(vocabulary, text)), end)
            for size in range(len(path) + 1):
                self.mass[path[:size]] += weight
        self.followers: dict[Path, set[int]] = defaultdict(set)
        for path in list(self.mass):
            if path:
                self.followers[path[:-1]].add(path[-1])

    def row(self, path: Path) -> np.ndarray:
        """Probabilities after a path, shape (rows,); uniform where the model never goes."""
        row = np.zeros(self.vocabulary.rows)
        whole = self.mass.get(path, 0.0)
        if whole <= 0 or not self.followers[path]:
            return np.full(self.vocabulary.rows, 1 / self.vocabulary.rows)
        for token in self.followers[path]:
            row[token] = self.mass[(*path, token)] / whole
        return row


def share(vocabulary: Vocabulary, texts: Mapping[bytes, float], prefix: bytes) -> dict[int | None, float]:
    """The oracle: s(c) by sums over all texts, None for the end of the text."""
    found: dict[int | None, float] = defaultdict(float)
    place = len(_begun(vocabulary, prefix)) if prefix else 0
    for text, weight in texts.items():
        if not text.startswith(prefix):
            continue
        at, ids = 0, vocabulary.encode(_begun(vocabulary, text))
        for token in ids:
            if at == place:
                found[token] += weight
            at += len(vocabulary.tokens[token])
        if len(text) == len(prefix):
            found[None] += weight
    total = sum(found.values())
    return {token: weight / total for token, weight in found.items()} if total else {}


def _begun(vocabulary: Vocabulary, text: bytes) -> bytes:
    """A text as the tokenizer begins it, with its dummy space."""
    return b"" if vocabulary.spelling is None else vocabulary.spelling.start + text


def walk(bridge: Bridge, tokens: Iterable[int]) -> tuple[Path, Place]:
    """The certain tokens and the place after some of the remote's tokens."""
    place, settled = bridge.start(), ()
    for token in tokens:
        certain, place = bridge.step(place, token)
        settled = (*settled, *certain)
    return settled, place


class Asked:
    """Rows of several models at paths below a settled beginning, made when they are asked for."""

    def __init__(self, models: list[TextModel], settled: Path) -> None:
        self.models, self.settled = models, settled
        self.rows: dict[Path, np.ndarray] = {}

    def add(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if path not in self.rows:
                self.rows[path] = np.stack([model.row((*self.settled, *path)) for model in self.models])


def expanded(bridge: Bridge, place: Place, candidates: list[int], asked: Asked, *, rounds: int) -> list[Shares]:
    """Readings from the least tree on, each with the open leaves of the one before."""
    asked.add(bridge.cover(place))
    asked.add(bridge.nodes(place, candidates, asked.rows))
    found = [bridge.read(place, candidates, asked.rows)]
    asked.add(bridge.nodes(place, candidates, asked.rows, least=0.0))
    for _ in range(rounds):
        found.append(bridge.read(place, candidates, asked.rows, least=1e-300))
        leaves = [path for weight, path in found[-1].open if weight > 0]
        if not leaves:
            break
        asked.add(leaves)
    return found


def checked(remote: Vocabulary, small: Vocabulary, texts: dict[bytes, float], prefix: list[int], *, rounds: int = 30) -> None:
    """All bounds on the way to full expansion hold, and at its end nothing is open."""
    bridge = Bridge(remote, small)
    settled, place = walk(bridge, prefix)
    oracle = share(remote, texts, remote.decode(prefix))
    if not oracle:
        return
    candidates = list(range(remote.rows))
    truth = np.array([oracle.get(None if token in remote.control else token, 0.0) for token in candidates])
    readings = expanded(bridge, place, candidates, Asked([TextModel(small, texts)], settled), rounds=rounds)
    for reading in readings:
        assert (reading.lower[0] <= truth + 1e-9).all()
        assert (truth <= reading.upper[0] + 1e-9).all()
    np.testing.assert_allclose(readings[-1].now[0], truth, atol=1e-9)
    np.testing.assert_allclose(readings[-1].lower[0], truth, atol=1e-9)
    np.testing.assert_allclose(readings[-1].upper[0], truth, atol=1e-9)
