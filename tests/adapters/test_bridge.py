"""The bridge against an oracle that sums over all texts."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toy_texts import Asked, TextModel, expanded, share, toy_vocabulary, walk
from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.tokens import Vocabulary

LENGTH = 7


def random_texts(seed: int, alphabet: bytes = b"ab", longest: int = LENGTH) -> dict[bytes, float]:
    """A weight for every text over the alphabet: few are likely, all are possible."""
    rng = np.random.default_rng(seed)
    texts = [bytes(letters) for size in range(longest + 1) for letters in itertools.product(alphabet, repeat=size)]
    weights = np.exp(3 * rng.normal(size=len(texts))) * np.array([len(alphabet) ** -len(text) for text in texts])
    return dict(zip(texts, weights / weights.sum(), strict=True))


def checked(remote: Vocabulary, small: Vocabulary, texts: dict[bytes, float], prefix: list[int], *, rounds: int = 30) -> None:
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


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=150, deadline=None)
def test_full_expansion_equals_the_sum_over_all_texts(seed: int, data: st.DataObject) -> None:
    remote, small = toy_vocabulary(seed, size=7), toy_vocabulary(seed + 1, size=8)
    text = data.draw(st.binary(max_size=4).map(lambda b: bytes(b"ab"[c % 2] for c in b)))
    checked(remote, small, random_texts(seed), remote.encode(text))


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_words_with_spaces(seed: int, data: st.DataObject) -> None:
    patterns = [r" ?[ab]+| +(?!\S)| +", r"[ab]+| +", r" *[ab]*", None]
    remote = toy_vocabulary(seed, alphabet=b"ab ", size=9, pattern=data.draw(st.sampled_from(patterns)))
    small = toy_vocabulary(seed + 1, alphabet=b"ab ", size=9, pattern=data.draw(st.sampled_from(patterns)))
    text = data.draw(st.binary(max_size=3).map(lambda b: bytes(b"ab "[c % 3] for c in b)))
    checked(remote, small, random_texts(seed, b"ab ", 5), remote.encode(text))
