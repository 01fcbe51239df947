"""Where tokenizers cut texts: what follows a place decides, and bounds hold with the patterns of released models."""

import numpy as np
import pytest

from real_tokenizers import GPT2, LLAMA3, installed
from toy_texts import Asked, TextModel, checked, expanded, random_texts, toy_vocabulary, walk
from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.cover import Covers


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_an_unfinished_contraction_is_not_certain(name: str) -> None:
    covers = Covers(installed(name))
    certain, _ = covers.advance(b"they", b"'l")
    assert certain == tuple(installed(name).encode("they'll"))[: len(certain)]
    assert not covers.sealed(b"they'", b"l")


@pytest.mark.parametrize("name", ["llama3", "qwen", "deepseek"])
def test_blank_lines_with_spaces_are_not_sealed(name: str) -> None:
    vocabulary = installed(name)
    pieces = [vocabulary.tokens[token] for token in vocabulary.encode("\n \n")]
    assert pieces == [b"\n \n"]
    assert not Covers(vocabulary).sealed(b"\n", b" ")


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("alphabet", "which"), [(b"a'l", GPT2), (b"a \n", LLAMA3), (b"a'l", LLAMA3)])
def test_published_patterns_on_toys(seed: int, alphabet: bytes, which: str) -> None:
    remote = toy_vocabulary(seed, alphabet=alphabet, size=9, pattern=which)
    small = toy_vocabulary(seed + 1, alphabet=alphabet, size=10, pattern=GPT2 if seed % 2 else LLAMA3)
    texts = random_texts(seed, alphabet, 5)
    text = sorted(texts)[seed * 7 % len(texts)]
    for cut in range(len(text) + 1):
        checked(remote, small, texts, remote.encode(text[:cut]))


def test_both_sides_begin_with_a_dummy_space() -> None:
    sentencepiece = installed("mistral1")
    bridge = Bridge(sentencepiece, sentencepiece)
    ids = sentencepiece.encode(" The lighthouse keeper")
    settled, place = walk(bridge, ids)
    assert [*settled, *bridge.small.path(place.tail)] == ids


def test_a_text_may_begin_without_the_dummy_space() -> None:
    """The tokenizer never writes that, but a model may: what it then weighs is open, so that the bounds hold."""
    sentencepiece = installed("mistral1")
    bridge, texts = Bridge(sentencepiece, sentencepiece), {b"The keeper": 0.7, b"A keeper": 0.3}
    settled, place = walk(bridge, [])
    candidates = [sentencepiece.tokens.index(data) for data in (b" The", b" A", b"The")]
    reading = expanded(bridge, place, candidates, Asked([TextModel(sentencepiece, texts)], settled), rounds=10)[-1]
    np.testing.assert_allclose(reading.lower[0], [0.7, 0.3, 0.0], atol=1e-9)
    np.testing.assert_allclose(reading.now[0], [0.7, 0.3, 0.7], atol=1e-9)
