"""How near the bridge and simpler schemes come to the exact distribution, which on toys is a sum over all texts of random models.

Two kinds of toys: byte pairs trained on two samples of one random language, as released tokenizers come about, and byte pairs put
together at random, some of which stand for whole words only and are harder for all schemes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from toy_texts import Asked, TextModel, share, toy_vocabulary, walk
from uld_adapters.vocabulary.bridge import Bridge, Path, Place, beginnings
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.shares import change
from uld_adapters.vocabulary.single_path import SinglePath
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_sdk.bridge_reader import AHEAD, LIKELY

Texts = dict[bytes, float]
PLANNED = "the plan's tree"
SIZES = 9, 18  # tokens of a trained vocabulary, at least and at most
WORDS, SAMPLE, MOVED = 40, 400, 0.4  # of a language, of a sample, and the largest share of words whose frequencies differ between samples


@dataclass(frozen=True)
class Kind:
    """Toys of one kind: `count` of them, with all texts of up to `longest` letters; `tilt` is how far the models lie apart."""

    count: int
    alphabet: bytes
    longest: int
    tilt: float
    vocabularies: Callable[[int, np.random.Generator, bytes], tuple[Vocabulary, Vocabulary]]

    def texts(self) -> list[bytes]:
        """All texts, the empty one first."""
        return [bytes(letters) for size in range(self.longest + 1) for letters in product(self.alphabet, repeat=size)]

    def model(self, rng: np.random.Generator, *, like: Texts | None = None) -> Texts:
        """A history-dependent model as weights of all its texts; with `like` a tilt of another one."""
        texts, spread = self.texts(), 2.0 if like is None else self.tilt
        # One factor for each beginning of a text, so that what follows depends on all that came before.
        factors = {text: rng.normal() * spread for text in texts}
        logs = np.array([sum(factors[text[:size]] for size in range(1, len(text) + 1)) for text in texts])
        logs += np.log([len(self.alphabet) ** -float(len(text)) for text in texts] if like is None else [like[text] for text in texts])
        weights = np.exp(logs - logs.max()) + 1e-12
        return dict(zip(texts, weights / weights.sum(), strict=True))


def trained(_seed: int, rng: np.random.Generator, alphabet: bytes) -> tuple[Vocabulary, Vocabulary]:
    """Two vocabularies whose byte pairs are trained on a sample each of one random language."""
    words = ["".join(map(chr, rng.choice(list(alphabet), size=int(rng.integers(2, 7))))) for _ in range(WORDS)]
    often = 1 / np.arange(1, WORDS + 1)
    other = np.arange(WORDS)
    moved = rng.permutation(WORDS)[: int(WORDS * rng.uniform(0, MOVED))]
    other[np.sort(moved)] = moved
    first, second = (
        _trained(
            [words[order[i]] for i in rng.choice(WORDS, size=SAMPLE, p=often / often.sum())],
            alphabet,
            int(rng.integers(*SIZES, endpoint=True)),
        )
        for order in (np.arange(WORDS), other)
    )
    return first, second


def _trained(words: Sequence[str], alphabet: bytes, size: int) -> Vocabulary:
    from tokenizers import Tokenizer, models, trainers

    raw = Tokenizer(models.BPE())
    letters = list(alphabet.decode())
    raw.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, max_token_length=4, initial_alphabet=letters, show_progress=False))
    tokens = sorted(raw.get_vocab(), key=raw.token_to_id)  # letters, then as they were merged
    return Vocabulary.from_bytes(
        [*(token.encode() for token in tokens), b"<end>"], control={len(tokens): Role.END_OF_TEXT}, order=range(len(tokens)), name="trained"
    )


def put_together(seed: int, _rng: np.random.Generator, alphabet: bytes) -> tuple[Vocabulary, Vocabulary]:
    """Two vocabularies whose byte pairs are put together at random."""
    return toy_vocabulary(seed, alphabet=alphabet, size=14), toy_vocabulary(seed + 10_000, alphabet=alphabet, size=16)


KINDS = {"trained": Kind(300, b"abcd", 5, 1.1, trained), "random": Kind(120, b"abc", 7, 0.7, put_together)}


def schemes(
    remote: Vocabulary, small: Vocabulary, models: list[Texts], prefix: list[int], base: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Log of s'(c)/s(c) for every token of the remote by each scheme, the exact one by sums over all texts; `base` is p_M.

    Also how many rows of the small model each bridge reads, and how many the plan's tree has.
    """
    text, tokens = remote.decode(prefix), list(range(remote.rows))
    told = [TextModel(small, texts) for texts in models]
    found: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    for name, weighing in (("bridge", Bridge(remote, small)), ("single path", SinglePath(remote, small))):
        settled, place = walk(weighing, prefix)
        asked = Asked(told, settled)
        asked.add(weighing.cover(place))
        asked.add(weighing.nodes(place, tokens, asked.rows))
        found[name] = change(weighing.read(place, tokens, asked.rows), None)[0]
        if isinstance(weighing, Bridge):
            plans = Asked(told, settled)
            plans.add([*asked.rows, *planned(weighing, place)])
            found[PLANNED] = change(weighing.read(place, tokens, plans.rows), None)[0]
            rows |= {PLANNED: len(plans.rows), name: len(asked.rows)}
            for name_, ahead in (("bridge, as the client reads", likely(base)), ("bridge, one look-ahead", tokens)):
                asked.add(weighing.nodes(place, tokens, asked.rows, ahead=ahead))
                found[name_] = change(weighing.read(place, tokens, asked.rows), None)[0]
                rows[name_] = len(asked.rows)
    exact = [share(remote, texts, text) for texts in models]
    mass = [_mass(remote, texts, text) for texts in models]
    first = [model.row(tuple(small.encode(text))) for model in told]
    end = next(iter(small.control))
    pieces = [end if token in remote.control else small.encode(remote.tokens[token])[0] for token in tokens]
    with np.errstate(divide="ignore", invalid="ignore"):
        found["exact"] = np.log([exact[0].get(None if t in remote.control else t, 0.0) for t in tokens]) - np.log(
            [exact[1].get(None if t in remote.control else t, 0.0) for t in tokens]
        )
        found["byte-prefix mass"] = np.log(mass[0]) - np.log(mass[1])
        found["first piece"] = np.log(first[0][pieces]) - np.log(first[1][pieces])
    found["no shift"] = np.zeros(len(tokens))
    return {name: np.nan_to_num(values, nan=0.0, posinf=30.0, neginf=-30.0) for name, values in found.items()}, rows


def planned(bridge: Bridge, place: Place) -> set[Path]:
    """The paths that the plan asks about beside the cover: all spellings of the proper beginnings of the remote's tokens."""
    tokens = (data for token, data in enumerate(bridge.remote.tokens) if token not in bridge.remote.vocabulary.control)
    begun = {data[:size] for data in tokens for size in range(1, len(data))}
    return set(beginnings(path for data in begun for path in bridge.small.paths(place.tail + data)))


def likely(chances: np.ndarray) -> list[int]:
    """The candidates after which the client reads on."""
    order = np.argsort(-chances, kind="stable")[:AHEAD]
    return [int(token) for token in order if chances[token] > LIKELY]


def _mass(remote: Vocabulary, texts: Texts, prefix: bytes) -> np.ndarray:
    whole = sum(weight for text, weight in texts.items() if text.startswith(prefix))
    found = [
        texts.get(prefix, 0.0) if token in remote.control else sum(w for t, w in texts.items() if t.startswith(prefix + data))
        for token, data in enumerate(remote.tokens)
    ]
    return np.array(found) / whole


def prefixes(kind: Kind, seed: int) -> Iterator[tuple[bool, dict[str, float], dict[str, int]]]:
    """Along a text of one toy: whether both sides have a token's end at a prefix, how far q = p_M s'/s is from the exact one, and rows."""
    rng = np.random.default_rng(seed)
    remote, small = kind.vocabularies(seed, rng, kind.alphabet)
    frozen = kind.model(rng)
    tuned, large = kind.model(rng, like=frozen), kind.model(rng, like=frozen)
    names = list(tuned)
    text = names[int(rng.choice(len(names), p=list(tuned.values())))]
    ids = remote.encode(text)
    ends = np.cumsum([0, *[len(small.tokens[token]) for token in small.encode(text)]])
    for at in range(len(ids)):
        prefix = ids[:at]
        begun = remote.decode(prefix)
        p = share(remote, large, begun)
        base = np.array([p.get(None if t in remote.control else t, 0.0) for t in range(remote.rows)])
        shifts, rows = schemes(remote, small, [tuned, frozen], prefix, base)
        exact = _weighted(base, shifts.pop("exact"))
        apart = {name: float(np.abs(_weighted(base, shift) - exact).sum()) / 2 for name, shift in shifts.items()}
        yield len(begun) in ends, apart, rows


def _weighted(base: np.ndarray, shift: np.ndarray) -> np.ndarray:
    weights = base * np.exp(shift)
    return weights / weights.sum()


def measure() -> dict[str, dict[str, Any]]:
    """Of each kind of toys and each scheme: the mean total variation and its standard error, at prefixes where both sides have a token's
    end (aligned) and elsewhere (mid-token), and the mean number of rows.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, kind in KINDS.items():
        distances: dict[str, dict[str, list[float]]] = {"aligned": defaultdict(list), "mid-token": defaultdict(list)}
        read: dict[str, dict[str, list[int]]] = {"aligned": defaultdict(list), "mid-token": defaultdict(list)}
        for seed in range(kind.count):
            for aligned, apart, rows in prefixes(kind, seed):
                where = "aligned" if aligned else "mid-token"
                for scheme, value in apart.items():
                    distances[where][scheme].append(value)
                for scheme, count in rows.items():
                    read[where][scheme].append(count)
        counts = {where: len(values["bridge"]) for where, values in distances.items()}
        schemes_ = {
            scheme: {
                where: [round(float(np.mean(values[scheme])), 4), round(float(np.std(values[scheme]) / np.sqrt(counts[where])), 4)]
                for where, values in distances.items()
            }
            for scheme in distances["aligned"]
        }
        rows_ = {scheme: {where: round(float(np.mean(of[scheme])), 2) for where, of in read.items()} for scheme in read["aligned"]}
        found[name] = {"prefixes": counts, "schemes": schemes_, "rows": rows_}
        print(f"{name} toys: {found[name]}", flush=True)
    return found
