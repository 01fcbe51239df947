"""Long words are spelled as short ones are, the best merge first and of several the leftmost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_files import ranks_of
from real_tokenizers import NAMES, installed
from uld_adapters.vocabulary.bpe import Bpe
from uld_adapters.vocabulary.tokens import Vocabulary

PARTS = st.lists(st.binary(min_size=2, max_size=8) | st.text("ab", min_size=2, max_size=8).map(str.encode), max_size=8)
LONG = st.binary(max_size=300) | st.text("ab", max_size=300).map(str.encode) | st.text("a", max_size=300).map(str.encode)


def both_ways(vocabulary: Vocabulary, word: bytes) -> tuple[list[int], list[int]]:
    assert vocabulary.spelling is not None
    speller = vocabulary.spelling.speller
    assert isinstance(speller, Bpe)
    return speller._merged(speller._symbols(word)), speller._merged_by_heap(speller._symbols(word))


@given(parts=PARTS, word=LONG, order=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_any_order_of_merges(parts: list[bytes], word: bytes, order: random.Random) -> None:
    tokens = ranks_of(parts)
    merged = list(range(256, len(tokens)))
    order.shuffle(merged)  # a later token may be the better one
    one, other = both_ways(Vocabulary.from_bytes(tokens, order=[*range(256), *merged]), b"".join(parts) + word)
    assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies(name: str) -> None:
    vocabulary = installed(name)
    rng = random.Random(2)
    words = [b"x" * 301, b" " * 200, b"=" * 77, b"ACGT" * 60, "漢字仮名".encode() * 30, b"aaab" * 50, rng.randbytes(400), b"", b"a"]
    for word in [*words, *(bytes(rng.choices(b"etaoin shrdlu", k=rng.randrange(400))) for _ in range(30))]:
        one, other = both_ways(vocabulary, word)
        assert one == other


def test_a_long_word_is_spelled_as_by_tiktoken() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranks_of([b"xxxxxxx", b"abab", b"bba"])
    vocabulary = Vocabulary.from_bytes(tokens, order=range(len(tokens)))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    library = tiktoken.Encoding("long", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    for text in ("x" * 5000, "ab" * 400 + "b" * 300, "abba" * 200):
        assert vocabulary.encode(text) == library.encode_ordinary(text)
