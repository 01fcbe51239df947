"""What a bridge sums, written down: the terms give its own values, and those of any other model that is put into them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toy_texts import Asked, TextModel, random_texts, toy_vocabulary, walk
from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.tally import LEAST, Tally
from uld_adapters.vocabulary.terms import Terms, write_terms


def sums(terms: Terms, rows: dict) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """The masses of the candidates, shape (models, candidates), and of the boundary by the terms."""
    zero = np.zeros(next(iter(rows.values())).shape[0])
    parts = np.stack([sum((term.mass(rows) for term in some or ()), zero) for some in terms.candidates], 1)
    return parts, sum((term.mass(rows) for term in terms.boundary), zero)[:, None]


def shares(terms: Terms, rows: dict) -> np.ndarray:  # type: ignore[type-arg]
    """S(c) of the candidates by the terms; what is open at a candidate and at the boundary is judged apart, hence the maximum."""
    parts, whole = sums(terms, rows)
    return parts / np.maximum(parts, whole)


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=80, deadline=None)
def test_terms_are_what_the_bridge_sums(seed: int, data: st.DataObject) -> None:
    alphabet = data.draw(st.sampled_from([b"ab", b"ab "]))
    pattern = data.draw(st.sampled_from([None, r" ?[ab]+| +(?!\S)| +"])) if b" " in alphabet else None
    remote = toy_vocabulary(seed, alphabet=alphabet, size=9, pattern=pattern)
    small = toy_vocabulary(seed + 1, alphabet=alphabet, size=9, pattern=pattern)
    bridge, candidates = Bridge(remote, small), list(range(remote.rows))
    text = bytes(data.draw(st.lists(st.sampled_from(alphabet), max_size=4)))
    settled, place = walk(bridge, remote.encode(text))
    first, second = (TextModel(small, random_texts(number, alphabet, 5)) for number in (seed, seed + 7))
    asked = Asked([first], settled)
    asked.add(bridge.cover(place))
    asked.add(bridge.nodes(place, candidates, asked.rows))
    read = bridge.read(place, candidates, asked.rows)
    terms = write_terms(bridge, place, candidates, asked.rows)
    np.testing.assert_allclose(shares(terms, asked.rows)[0], read.now[0], atol=1e-9)
    weigher, boundary = bridge.weigher(place, asked.rows, LEAST), Tally.empty(2)
    bridge.boundary(weigher, place, boundary)
    counted, parts, whole = bridge.one_by_one(weigher, place, candidates), *sums(terms, asked.rows)
    np.testing.assert_allclose(parts[0] * weigher.weight(())[0], (counted.mass[0] + counted.mass[1])[:, 0], atol=1e-9)
    np.testing.assert_allclose(whole[0] * weigher.weight(())[0], (boundary.yes + boundary.now)[:1], atol=1e-9)
    other = Asked([second], settled)
    other.add(asked.rows)
    both = {path: np.concatenate([asked.rows[path], other.rows[path]]) for path in asked.rows}
    # Where every spelling is looked at by itself, another model put into the terms gives what the bridge reads of it.
    if all((row > 1e-3).all() for row in asked.rows.values()):
        np.testing.assert_allclose(shares(terms, both)[1], bridge.read(place, candidates, other.rows).now[0], atol=1e-6)


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_with_one_vocabulary_the_terms_give_any_models_own_probabilities(seed: int, data: st.DataObject) -> None:
    vocabulary = toy_vocabulary(seed, size=8, met=True)  # a token that stands for a whole word only would be spelled anew as more follows
    text = bytes(data.draw(st.lists(st.sampled_from(b"ab"), max_size=4)))
    bridge, prefix = Bridge(vocabulary, vocabulary), vocabulary.encode(text)
    settled, place = walk(bridge, prefix)
    models = [TextModel(vocabulary, random_texts(number)) for number in (seed, seed + 7)]
    candidates, asked = list(range(vocabulary.rows)), Asked(models[:1], settled)
    asked.add(bridge.cover(place))
    asked.add(bridge.nodes(place, candidates, asked.rows))
    terms = write_terms(bridge, place, candidates, asked.rows)
    rows = {path: models[1].row((*settled, *path))[None] for path in asked.rows}
    if models[1].mass.get(tuple(prefix), 0.0) > 0:
        # Of tokens that are spelled in one way; of others the terms leave out what the first model holds for unlikely.
        told = [at for at, some in enumerate(terms.candidates) if some is not None and len(some) == 1]
        found, own = shares(terms, rows)[0][told], models[1].row(tuple(prefix))[told]
        np.testing.assert_allclose(found * own.sum(), own * found.sum(), atol=1e-9)
