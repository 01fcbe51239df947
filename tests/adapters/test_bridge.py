"""The bridge against an oracle that sums over all texts."""

import gc
import random
import unicodedata
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from real_tokenizers import installed
from toy_texts import Asked, TextModel, checked, expanded, random_texts, share, toy_vocabulary, walk
from uld_adapters.vocabulary.bpe import Bpe
from uld_adapters.vocabulary.bridge import Bridge, Place, Rows
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.gathering import Gathering
from uld_adapters.vocabulary.shares import Shares, change, excess
from uld_adapters.vocabulary.tally import LEAST
from uld_adapters.vocabulary.tokens import Vocabulary


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


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_vocabulary_on_both_sides_is_the_identity(seed: int, data: st.DataObject) -> None:
    vocabulary = toy_vocabulary(seed, size=8, met=True)
    texts = random_texts(seed)
    text = data.draw(st.binary(max_size=4).map(lambda b: bytes(b"ab"[c % 2] for c in b)))
    bridge, model = Bridge(vocabulary, vocabulary), TextModel(vocabulary, texts)
    prefix = vocabulary.encode(text)
    settled, place = walk(bridge, prefix)
    readings = expanded(bridge, place, list(range(vocabulary.rows)), Asked([model], settled), rounds=30)
    if model.mass.get(tuple(prefix), 0.0) > 0:
        np.testing.assert_allclose(readings[-1].now[0], model.row(tuple(prefix)), atol=1e-9)


@given(seed=st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_names_of_tokens_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    remote, small = toy_vocabulary(seed, size=7), toy_vocabulary(seed + 1, size=8)
    texts = random_texts(seed)
    found = []
    for permuted in (False, True):
        sides = []
        for vocabulary in (remote, small):
            order = rng.permutation(vocabulary.rows) if permuted else np.arange(vocabulary.rows)
            tokens = [b""] * vocabulary.rows
            for token, place in enumerate(order):
                tokens[place] = vocabulary.tokens[token]
            ranks = [int(order[token]) for token in _ranks(vocabulary)]
            ends = {int(order[token]): role for token, role in vocabulary.roles.items()}
            sides.append((Vocabulary.from_bytes(tokens, control=ends, order=ranks), order))
        (first, names), (second, _) = sides
        bridge = Bridge(first, second)
        settled, place = walk(bridge, first.encode(b"ab"))
        asked = Asked([TextModel(second, texts)], settled)
        reading = expanded(bridge, place, [int(names[token]) for token in range(remote.rows)], asked, rounds=2)[-1]
        found.append((reading.now[0], reading.lower[0], reading.upper[0]))
    for plain, other in zip(*found, strict=True):
        np.testing.assert_allclose(plain, other, atol=1e-12)


def _ranks(vocabulary: Vocabulary) -> list[int]:
    assert vocabulary.spelling is not None
    speller = vocabulary.spelling.speller
    assert isinstance(speller, Bpe)
    text = [token for token in range(vocabulary.rows) if token not in vocabulary.control]
    return sorted(text, key=lambda token: (speller.rank[token], token))


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_uniform_assistant_and_a_pair_that_learned_nothing_shift_nothing(seed: int, data: st.DataObject) -> None:
    remote, small = toy_vocabulary(seed, size=7), toy_vocabulary(seed + 1, size=8)
    text = data.draw(st.binary(max_size=4).map(lambda b: bytes(b"ab"[c % 2] for c in b)))
    bridge = Bridge(remote, small)
    settled, place = walk(bridge, remote.encode(text))
    candidates = list(range(remote.rows))
    ahead = data.draw(st.lists(st.sampled_from(candidates), max_size=3))
    uniform = np.full((1, small.rows), 1 / small.rows)
    rows = {path: uniform for path in bridge.cover(place)}
    rows |= {path: uniform for path in bridge.nodes(place, candidates, rows, ahead=ahead)}
    np.testing.assert_allclose(excess(bridge.read(place, candidates, rows))[0], 0.0, atol=1e-9)
    same = Asked([TextModel(small, random_texts(seed))] * 2, settled)
    same.add(bridge.cover(place))
    same.add(bridge.nodes(place, candidates, same.rows, ahead=ahead))
    np.testing.assert_allclose(change(bridge.read(place, candidates, same.rows), 0.5)[0], 0.0, atol=1e-9)


PAIRS = [
    ("llama3", "qwen"),
    ("o200k", "qwen"),
    ("llama3", "gpt2"),
    ("gpt2", "llama3"),
    ("mistral1", "llama3"),
    ("tekken", "llama3"),
    ("qwen", "smollm2"),
]
NASTY = [
    "it's they'll WE'RE don't",
    "x = 1234567 + 89 12345678901234",
    "a  b   c    d     \t\t\n  x",
    "one\r\ntwo\r\n\r\n three\n\n\n",
    "👩‍👩‍👧‍👦🏳️‍🌈😀 smile ☃",
    "漢字とかな交じり文。한국어 텍스트",
    "café cafe\u0301 ñ n\u0303 A\u030a",
    "<|im_end|> <s> [INST] </s><|eot_id|>",
    "def f(x):\n\tif x  >  10:\n        return {'a': [1, 22]}",
    "fooBarBaz HTTPServer ÉCOLE naïve",
    "———“quoted” … ½ １２３ \u00a0 \u2028 end",
]
ENDINGS = ["", " ", "a", "s", " the", "\n", "ing", "1", "'s", ".", "  ", "e\u0301", "漢", " x = 2", "\r\n", "lighthouse keeper"]


def real_pair(remote: str, small: str) -> Bridge:
    first, second = installed(remote), installed(small)
    if (remote, small) not in _made:
        _made[remote, small] = Bridge(first, second)
    return _made[remote, small]


_made: dict[tuple[str, str], Bridge] = {}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_real_tokenizers_cut_at_every_byte(first: str, second: str) -> None:
    cut_at_every_byte(real_pair(first, second), NASTY)


@pytest.mark.parametrize("composing", ["remote", "small", "both"])
def test_tokenizers_that_compose_cut_at_every_byte(tmp_path: Path, composing: str) -> None:
    """A vocabulary with NFC spells what is written, as one without does; of this the bounds hold."""
    plain, composed = tiny_vocabulary(tmp_path / "plain", 330, nfc=False), tiny_vocabulary(tmp_path / "nfc", 400, nfc=True)
    assert composed.normalisers == ("NFC",)
    assert composed.encode("cafe\u0301") != composed.encode("caf\u00e9"), "its tokenizer would give one and the same"
    assert composed.decode(composed.encode("cafe\u0301")) == "cafe\u0301".encode()
    smaller = tiny_vocabulary(tmp_path / "smaller", 340, nfc=True)
    sides = {"remote": (composed, plain), "small": (plain, composed), "both": (composed, smaller)}
    cut_at_every_byte(Bridge(*sides[composing]), [text for text in NASTY if unicodedata.normalize("NFC", text) != text])


def tiny_vocabulary(folder: Path, size: int, *, nfc: bool) -> Vocabulary:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    raw = tiny.tiny_tokenizer(folder, vocab_size=size).backend_tokenizer
    if nfc:
        raw.normalizer = normalizers.NFC()
    return Vocabulary.from_hf(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>"))


def cut_at_every_byte(bridge: Bridge, nasty: list[str]) -> None:
    """Of texts that are hard to split, every prefix in bytes: the bounds hold, and full expansion is exact."""
    assert nasty
    remote, small = bridge.remote.vocabulary, bridge.small.vocabulary
    end = next(mine for mine, theirs in bridge.control.items() if small.roles[theirs] is Role.END_OF_TEXT)
    rng = random.Random(5)
    for text in nasty:
        data = text.encode()
        for cut in range(0, len(data) + 1):
            texts = {}
            for _ in range(12):
                kept = data[cut : cut + rng.choice([0, 1, 2, 3, 4, 6, 8, 12, 40])]
                try:
                    whole = (data[:cut] + kept).decode()
                except UnicodeDecodeError:
                    whole = text
                texts[(whole + rng.choice(ENDINGS) + rng.choice(ENDINGS)).encode()] = rng.random() ** 3
            oracle = share(remote, texts, data[:cut])
            if not oracle:
                continue
            start = b"" if remote.spelling is None else remote.spelling.start
            settled, place = walk(bridge, remote.encode(start + data[:cut]) if cut else [])
            candidates = [end if token is None else token for token in oracle]
            truth = np.array(list(oracle.values()))
            readings = expanded(bridge, place, candidates, Asked([TextModel(small, texts)], settled), rounds=40)
            for reading in readings:
                assert np.isfinite(reading.now).all(), data[:cut]
                assert (reading.lower[0] <= truth + 1e-9).all(), data[:cut]
                assert (truth <= reading.upper[0] + 1e-9).all(), data[:cut]
            np.testing.assert_allclose(readings[-1].now[0], truth, atol=1e-9)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_uniform_assistant_and_a_pair_that_learned_nothing_change_nothing_on_real_tokenizers(first: str, second: str) -> None:
    bridge = real_pair(first, second)
    uniform = np.full((1, bridge.rows), 1 / bridge.rows)
    rng = np.random.default_rng(1)
    some = np.exp(3 * rng.normal(size=(5, bridge.rows)))
    some /= some.sum(1, keepdims=True)
    for text in NASTY:
        ids = bridge.remote.vocabulary.encode(text)
        for at in range(0, len(ids), 3):
            _, place = walk(bridge, ids[:at])
            candidates = [ids[at], *rng.integers(0, bridge.remote.vocabulary.rows, 19).tolist()]
            rows = {path: uniform for path in bridge.cover(place)}
            rows |= {path: uniform for path in bridge.nodes(place, candidates, rows, ahead=candidates[:2])}
            np.testing.assert_allclose(excess(bridge.read(place, candidates, rows))[0], 0.0, atol=1e-6)
            equal = {path: np.stack([some[sum(path) % 5]] * 2) for path in rows}
            equal |= {path: np.stack([some[sum(path) % 5]] * 2) for path in bridge.nodes(place, candidates, equal, ahead=candidates[:2])}
            np.testing.assert_allclose(change(bridge.read(place, candidates, equal), 0.5)[0], 0.0, atol=1e-6)


def test_light_spellings_are_sorted_by_their_bytes_where_bounds_are_to_be_narrow() -> None:
    """Under the uniform model all spellings are light; a closer look decides most of them, within the bounds of the first."""
    bridge = real_pair("llama3", "qwen")
    remote = bridge.remote.vocabulary
    place, uniform = bridge.start(), np.full((1, bridge.rows), 1 / bridge.rows)
    candidates = [remote.encode(text.encode())[0] for text in ("?", ' "', " the", "   ", " (", "`,")]
    rows = {path: uniform for path in bridge.cover(place)}
    rows |= {path: uniform for path in bridge.nodes(place, candidates, rows)}
    wide, close = (bridge.read(place, candidates, rows, least=least) for least in (1e-3, 1e-4))
    assert (wide.lower <= close.lower + 1e-9).all()
    assert (close.upper <= wide.upper + 1e-9).all()
    assert (close.upper[-1] < wide.upper[-1]).all()
    assert np.median(close.upper[-1] / wide.upper[-1]) < 0.5


@pytest.mark.parametrize(("first", "second"), [("gpt2", "llama3"), ("llama3", "qwen")])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_uniform_baseline_counts_spellings_that_are_light_one_by_one(first: str, second: str, ahead: bool) -> None:
    """Thousands of Llama 3's tokens begin with a full stop that GPT-2 spells by itself: together they outweigh the stop."""
    bridge = real_pair(first, second)
    remote, index = bridge.remote.vocabulary, bridge.small.index
    place, uniform = bridge.start(), np.full((1, bridge.rows), 1 / bridge.rows)
    candidates = [remote.encode(text)[0] for text in (b".", b" the", b" T", b"(", b"=", b" s")]
    rows = {path: uniform for path in bridge.cover(place)}
    rows |= {path: uniform for path in bridge.nodes(place, candidates, rows, ahead=candidates if ahead else ())}
    found = bridge.read(place, candidates, rows).now[-1] * bridge.rows
    for token, counted in zip(candidates, found, strict=True):
        low, high = index.span(remote.tokens[token])
        begun = [remote.encode(bridge.small.tokens[small])[0] for small in index.ids[low:high].tolist()]
        assert counted == pytest.approx(begun.count(token), rel=0.05), remote.tokens[token]
    if first == "gpt2":
        assert found[0] > 1000


@pytest.mark.parametrize("ahead", [False, True])
def test_indentation_has_its_share_whether_or_not_the_model_is_read_on_after_it(ahead: bool) -> None:
    """Whatever follows seven spaces can change how they are cut; light tokens after them hold what holds without them."""
    bridge = real_pair("llama3", "qwen")
    remote = bridge.remote.vocabulary
    _, place = walk(bridge, remote.encode("def f() -> one\n"))
    uniform, candidates = np.full((1, bridge.rows), 1 / bridge.rows), remote.encode("       ")
    rows = {path: uniform for path in bridge.cover(place)}
    rows |= {path: uniform for path in bridge.nodes(place, candidates, rows, ahead=candidates if ahead else ())}
    assert bridge.read(place, candidates, rows).now[-1][0] * bridge.rows == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_text_advances_by_pieces_as_it_does_at_once(step: int) -> None:
    bridge = real_pair("llama3", "gpt2")
    for covers in (bridge.remote, bridge.small):
        for text in (*NASTY, "def f(a):\n\n        return  they'll, 12345  # (x)\r\n\tend"):
            data, tail = text.encode(), b""
            for at in range(0, len(data), step):
                found = covers.advance(tail, data[at : at + step])
                assert found == covers.advance(b"", tail + data[at : at + step])
                tail = found[1]


def test_rows_are_let_go_once_they_are_read_without_waiting_for_the_garbage_collector() -> None:
    """A hundred positions' rows of a large vocabulary take a gigabyte."""
    bridge = Bridge(toy_vocabulary(1), toy_vocabulary(2))
    place, candidates, uniform = bridge.start(), range(5), np.full((1, bridge.rows), 1 / bridge.rows)
    rows = {path: uniform for path in bridge.cover(place)}
    gone = weakref.ref(uniform)
    gc.disable()
    try:
        rows |= {path: uniform for path in bridge.nodes(place, candidates, rows)}
        bridge.read(place, candidates, rows)
        del rows, uniform
        assert gone() is None
    finally:
        gc.enable()


def test_a_place_without_candidates_has_no_shares() -> None:
    bridge = Bridge(toy_vocabulary(1), toy_vocabulary(2))
    for place in (bridge.start(), walk(bridge, bridge.remote.vocabulary.encode(b"ab"))[1]):
        rows = {path: np.full((1, bridge.rows), 1 / bridge.rows) for path in bridge.cover(place)}
        assert bridge.nodes(place, [], rows) == set()
        shares = bridge.read(place, [], rows)
        assert shares.now.shape == shares.lower.shape == shares.upper.shape == (2, 0)


@pytest.mark.parametrize(("first", "second"), [("llama3", "gpt2"), ("qwen", "smollm2"), ("mistral1", "llama3")])
def test_candidates_gathered_at_once_have_the_shares_of_a_look_at_each(first: str, second: str) -> None:
    bridge, rng = real_pair(first, second), np.random.default_rng(3)
    remote = bridge.remote.vocabulary
    some = np.exp(4 * rng.normal(size=(5, 2, bridge.rows)))
    some /= some.sum(2, keepdims=True)
    for text in (*NASTY, "the quick brown fox"):
        ids = remote.encode(text)
        for at in range(1, len(ids), 3):
            _, place = walk(bridge, ids[:at])
            candidates = list({ids[at], *rng.integers(0, remote.rows, 30).tolist(), *rng.integers(0, 1000, 30).tolist(), *remote.control})
            rows = {path: some[sum(path) % 5] for path in bridge.cover(place)}
            ahead = ids[at : at + 1] if at % 2 else ()
            rows |= {path: some[sum(path) % 5] for path in bridge.nodes(place, candidates, rows, ahead=ahead)}
            found, closer = bridge.read(place, candidates, rows), looked_at_each(bridge, place, candidates, rows)
            np.testing.assert_allclose(found.now, closer.now, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.lower, closer.lower, rtol=1e-9, atol=1e-12)
            assert (found.upper <= closer.upper + LEAST).all()
            assert (found.now <= found.upper + 1e-12).all()


def looked_at_each(bridge: Bridge, place: Place, candidates: Sequence[int], rows: Rows) -> Shares:
    """What `read` tells when it looks at the spellings of each candidate by themselves."""
    each = partial(bridge.one_by_one, place=place, candidates=candidates)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Gathering, "tell", lambda gathering: each(gathering.weigher))
        return bridge.read(place, candidates, rows)


@given(seed=st.integers(0, 100_000), sparse=st.booleans(), pattern=st.sampled_from([None, r" ?[ab]+| +(?!\S)| +", r"[ab]+| +"]))
@settings(max_examples=200, deadline=None)
def test_candidates_gathered_at_once_have_these_shares_whatever_the_rows(seed: int, sparse: bool, pattern: str | None) -> None:
    """Also where tokens have all or nothing, at places that have next to nothing themselves."""
    rng = np.random.default_rng(seed)
    alphabet = b"ab " if pattern else b"ab"
    remote, small = (toy_vocabulary(seed + side, alphabet=alphabet, size=9 + side, pattern=pattern) for side in range(2))
    bridge = Bridge(remote, small)
    _, place = walk(bridge, remote.encode(bytes(rng.choice(list(alphabet), int(rng.integers(0, 6))).tolist())))
    rows: dict[tuple[int, ...], np.ndarray] = {}

    def add(paths: Iterable[tuple[int, ...]]) -> None:
        for path in paths:
            row = np.exp(rng.choice([0.1, 2, 6]) * rng.normal(size=(2, bridge.rows)))
            row *= rng.random(row.shape) < (0.3 if sparse else 1.0)
            row[:, 0] += 1e-30
            rows[path] = row / row.sum(1, keepdims=True)

    add(bridge.cover(place))
    candidates = rng.permutation(remote.rows)[: int(rng.integers(0, remote.rows + 1))].tolist()
    add(sorted(bridge.nodes(place, candidates, rows, ahead=candidates[:3])))
    found, closer = bridge.read(place, candidates, rows), looked_at_each(bridge, place, candidates, rows)
    np.testing.assert_allclose(found.now, closer.now, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.lower, closer.lower, rtol=1e-9, atol=1e-9)
    assert (found.now <= found.upper + 1e-12).all()


def test_nobody_reads_on_where_nothing_can_change() -> None:
    remote = Vocabulary.from_bytes([b"a", b"b", b"ab", b"<end>"], control={3: Role.END_OF_TEXT}, order=range(3))
    small = Vocabulary.from_bytes([b"a", b"b", b"<end>"], control={2: Role.END_OF_TEXT}, order=range(2))
    bridge = Bridge(remote, small)
    place, uniform = bridge.start(), np.full((1, bridge.rows), 1 / bridge.rows)
    rows = {path: uniform for path in bridge.cover(place)}
    a, ab = 0, 2
    assert bridge.nodes(place, [ab], rows, ahead=[ab]) == {(0,)}, "its second piece, and nothing after it"
    assert bridge.nodes(place, [a], rows, ahead=[a]) == {(0,)}, "whether a `b` follows"
    assert bridge.nodes(place, [a], rows) == set()


def test_nobody_reads_on_after_a_spelling_that_is_light_beside_another() -> None:
    bridge = Bridge(toy_vocabulary(1), toy_vocabulary(2))
    row = np.full((1, bridge.rows), 1e-4)
    row[0, :2] = 0.9, 0.09
    weigher = bridge.weigher(bridge.start(), {(): row}, LEAST)
    assert weigher.heaviest([(0,), (1,), (3,)]) == [(0,), (1,)]
    assert weigher.heaviest([(3,)]) == [(3,)], "the only one"
    assert weigher.heaviest([(3,), (1, 4)]) == [(3,), (1, 4)], "as far as is known it may be as heavy as its first token"
    assert weigher.heaviest([(0,), (3, 1)]) == [(0,)]
    assert weigher.heaviest([(1, 4), (3, 1)]) == [(1, 4), (3, 1)], "of neither it is known"
    other = np.full((1, bridge.rows), 1e-4)
    other[0, :2] = 1e-5, 2e-4
    both = bridge.weigher(bridge.start(), {(): np.concatenate([row, other])}, LEAST)
    assert both.heaviest([(0,), (1,), (3,)]) == [(0,), (1,), (3,)], "light under one model, not under the other"
