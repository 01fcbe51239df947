"""What a bridge sums, written down: the terms give its own values, and those of any other model that is put into them."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toy_texts import Asked, TextModel, random_texts, toy_vocabulary, walk
from uld_adapters.vocabulary.bridge import Bridge, Path
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
    asked = Asked([TextModel(small, random_texts(seed, alphabet, 5))], settled)
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


def smoothed(asked: Asked) -> dict[Path, np.ndarray]:
    """Rows of a model that gives every token some mass."""
    return {path: 0.5 * row + 0.5 / row.shape[1] for path, row in asked.rows.items()}


def lightest(rows: dict[Path, np.ndarray]) -> float:
    """The mass of the lightest token below any of the paths."""
    return min(float(np.prod([rows[path[:at]][0, token] for at, token in enumerate(path)]) * row.min()) for path, row in rows.items())


@given(seed=st.integers(0, 100_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_another_model_put_into_the_terms_gives_what_the_bridge_reads_of_it(seed: int, data: st.DataObject) -> None:
    alphabet = data.draw(st.sampled_from([b"ab", b"ab "]))
    pattern = data.draw(st.sampled_from([None, r" ?[ab]+| +(?!\S)| +"])) if b" " in alphabet else None
    remote, small = (toy_vocabulary(number, alphabet=alphabet, size=5, pattern=pattern) for number in (seed, seed + 1))
    bridge, candidates = Bridge(remote, small), list(range(remote.rows))
    text = bytes(data.draw(st.lists(st.sampled_from(alphabet), max_size=4)))
    settled, place = walk(bridge, remote.encode(text))
    first, second = (Asked([TextModel(small, random_texts(number, alphabet, 5))], settled) for number in (seed, seed + 7))
    first.add(bridge.cover(place))
    first.add(bridge.nodes(place, candidates, smoothed(first)))
    second.add(first.rows)
    rows, others = smoothed(first), smoothed(second)
    assume(min(lightest(rows), lightest(others)) > LEAST)  # so that every spelling is looked at by itself
    both = {path: np.concatenate([rows[path], others[path]]) for path in rows}
    found = shares(write_terms(bridge, place, candidates, rows), both)
    np.testing.assert_allclose(found[1], bridge.read(place, candidates, others).now[0], atol=1e-9)


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
