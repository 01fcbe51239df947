"""Verdicts on pairs of vocabularies, and what a gather reads."""

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from rank_files import rank_file, ranks_of
from real_tokenizers import installed
from uld_adapters.errors import TokenizerMismatch, UsageError
from uld_adapters.vocabulary.alignment import NOWHERE, gather
from uld_adapters.vocabulary.classify import aligned_share, classify
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.fingerprint import CORPUS
from uld_adapters.vocabulary.opening import open_tokenizer, open_vocabulary
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer
from uld_adapters.vocabulary.verdicts import kind_of
from uld_sdk.aligning import align

LETTERS = [bytes([byte]) for byte in range(256)]
MERGED = [b"th", b"the", b" the", b"ing", b" t", b"in", b"re", b"er"]


def ranked(tokens: list[bytes], *, shift: int = 0, control: tuple[str, ...] = ("<|end|>",), name: str = "") -> Vocabulary:
    """A byte-pair vocabulary with control tokens first and ids shifted by these."""
    names = [f"<c{i}>" for i in range(shift)]
    everything = [*(n.encode() for n in names), *tokens, *(c.encode() for c in control)]
    roles = {i: Role.OTHER for i in range(shift)}
    roles |= {shift + len(tokens) + i: Role.END_OF_TURN if i == 0 else Role.OTHER for i in range(len(control))}
    order = range(shift, shift + len(tokens))
    return Vocabulary.from_bytes(everything, control=roles, order=order, pattern=r" ?\p{L}+|[^\p{L}]", name=name)


TOKENS = [*LETTERS, *MERGED]


def test_the_same_tokens_are_an_identity() -> None:
    fit = classify(ranked(TOKENS, name="one"), ranked(TOKENS, control=("<|end|>", "<|tool|>"), name="two"))
    assert (fit.kind, fit.shared, fit.boundaries, fit.neutral) == ("identity", 1.0, 1.0, ())
    back = classify(ranked(TOKENS, control=("<|end|>", "<|tool|>")), ranked(TOKENS))
    assert (back.kind, back.neutral) == ("identity", (("<|tool|>", "a control token without a counterpart"),))


def test_shifted_tokens_are_a_permutation() -> None:
    remote, small = ranked(TOKENS), ranked(TOKENS, shift=7)
    assert classify(remote, small).kind == "permutation"
    table = gather(remote, small)
    tokens = remote.encode("the thing in the river")
    assert table.plan(tokens) == small.encode("the thing in the river")
    excess = np.arange(small.rows, dtype=float)
    found = table.read(excess)
    assert found[tokens].tolist() == [float(i) for i in table.plan(tokens)]


def test_other_merges_need_a_bridge_though_one_lies_in_the_other() -> None:
    inner = ranked(TOKENS, name="inner")
    outer = ranked([*TOKENS, b" then", b" them"], name="outer")
    fit = classify(inner, outer)
    assert (fit.kind, fit.shared) == ("bridge", 1.0)
    assert classify(outer, inner).shared < 1.0


def test_the_same_bytes_in_another_order_of_merges_need_a_bridge() -> None:
    """By the order "then" is the+n or th+en, a word that no corpus needs to have."""
    first, second = (
        ranked([*LETTERS, *merged], name=name) for merged, name in (([b"th", b"the", b"en"], "a"), ([b"en", b"th", b"the"], "b"))
    )
    assert [[v.tokens[i] for i in v.encode("then")] for v in (first, second)] == [[b"the", b"n"], [b"th", b"en"]]
    assert classify(first, second).kind == "bridge"
    assert classify(ranked(TOKENS), ranked([*LETTERS, *reversed(MERGED)])).kind == "bridge"


def test_tokens_of_the_same_bytes_count_together() -> None:
    small = Vocabulary.from_bytes([*LETTERS, b"a", b"<|end|>"], control={257: Role.END_OF_TURN}, order=range(256))
    remote = Vocabulary.from_bytes([*LETTERS, b"<|end|>", b"<|pad|>"], control={256: Role.END_OF_TURN, 257: Role.OTHER}, order=range(256))
    table = gather(remote, small)
    excess = np.linspace(-3.0, 3.0, small.rows)
    found = table.read(excess)
    both = np.logaddexp(excess[97], excess[256]) - np.log(2)
    assert found[97] == pytest.approx(both)
    assert found[98] == excess[98]
    assert found[256] == excess[257], "the end of a turn by its role"
    assert found[257] == 0.0, "a control token without a counterpart has no shift"
    chances = table.logprobs(excess)
    assert chances[97] == pytest.approx(np.logaddexp(excess[97], excess[256])), "probabilities of the same bytes add up"
    assert chances[257] == -np.inf, "what has no counterpart has no probability"
    assert table.plan([97, 257]) == [97, 257]
    assert (table.rows == NOWHERE).any()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_any_permutation_is_undone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(TOKENS))
    shuffled = [b""] * len(TOKENS)
    for rank, place in enumerate(order):
        shuffled[place] = TOKENS[rank]
    small = Vocabulary.from_bytes(
        [*shuffled, b"<|end|>"], control={len(TOKENS): Role.END_OF_TURN}, order=[int(i) for i in order], pattern=r" ?\p{L}+|[^\p{L}]"
    )
    remote = ranked(TOKENS)
    assert classify(remote, small).kind == "permutation"
    excess = rng.normal(size=small.rows)
    np.testing.assert_allclose(gather(remote, small).read(excess)[: len(TOKENS)], excess[order])


def hf(folder: Path, **changes: Any) -> Vocabulary:
    """The tiny tokenizer with its serialised state changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny.tiny_tokenizer(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | changes
    raw = Tokenizer.from_str(json.dumps(state))
    return Vocabulary.from_hf(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>"), name="changed")


@pytest.mark.parametrize("kept", ["same ids", "other ids"])
def test_ends_are_asked_for_in_every_mode(kept: str) -> None:
    """Where two tokenizers have the same tokens, too; the very same tokenizer on both sides needs none."""
    with_end, shift = ranked(TOKENS, control=("<|end|>",), name="with end"), 0 if kept == "same ids" else 3
    without = ranked(TOKENS, shift=shift, control=("<|x|>",), name="endless")
    without = replace(without, roles=dict.fromkeys(without.roles, Role.OTHER))
    for remote, small in ((with_end, without), (without, with_end)):
        with pytest.raises(TokenizerMismatch, match="endless beside with end has no token that ends an answer"):
            classify(remote, small)
    assert classify(without, without).kind == "identity"


def test_ids_may_have_holes(tmp_path: Path) -> None:
    """As cl100k's have between its control tokens."""
    plain = hf(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "holes", dirs_exist_ok=True)
    tokenizer = tiny.tiny_tokenizer(tmp_path / "holes")
    state = json.loads((tmp_path / "holes" / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    size = len(tokenizer)
    state["model"]["vocab"][last] = size + 9
    (tmp_path / "holes" / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    holes = open_vocabulary(tmp_path / "holes")
    assert holes.rows == size + 10
    assert {holes.roles[token] for token in range(size - 1, size + 9)} == {Role.OTHER}
    assert holes.tokens[size] == f"<unused {size}>".encode()
    text = " ".join(tiny.CORPUS)
    assert size + 9 in holes.encode(text)
    assert holes.decode(holes.encode(text)).decode() == text
    assert holes.encode(text) == load_tokenizer(tmp_path / "holes").encode(text, add_special_tokens=False)
    for remote, small in ((holes, plain), (plain, holes)):
        assert classify(remote, small).kind == "permutation"
        excess, data = np.arange(float(small.rows)), holes.tokens[size + 9]
        assert gather(remote, small).read(excess)[remote.tokens.index(data)] == small.tokens.index(data)


def test_bytes_that_one_side_cannot_spell_do_not_shift_the_others_ends() -> None:
    whole = ranked(TOKENS, name="whole")
    gap = Vocabulary.from_bytes(
        [*(data for data in TOKENS if data != b"\x04"), b"<|end|>"],
        control={len(TOKENS) - 1: Role.END_OF_TURN}, order=range(len(TOKENS) - 1), pattern=r" ?\p{L}+|[^\p{L}]", name="gap",
    )  # fmt: skip
    for remote, small in ((whole, gap), (gap, whole)):
        assert aligned_share(remote, small, "the king sings") == 1.0
        assert aligned_share(remote, small, "\x04the king\x04 sings") == 1.0


CHANGING = [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [{"type": "NFD"}]}]


@pytest.mark.parametrize("normalizer", CHANGING)
def test_normalisers_that_change_letters_are_refused(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    changed, plain = hf(tmp_path / "a", normalizer=normalizer), ranked(TOKENS, name="plain")
    for remote, small, fix in ((changed, plain, "the same tokenizer"), (plain, changed, "keeps texts")):
        with pytest.raises(TokenizerMismatch, match="changed beside plain") as caught:
            classify(remote, small)
        assert fix in caught.value.hint
    unchanged = hf(tmp_path / "b")  # the same tokens, and merges
    assert changed.fingerprint != unchanged.fingerprint  # what a client compares first
    for remote, small in ((changed, unchanged), (unchanged, changed)):
        with pytest.raises(TokenizerMismatch, match="changes every text"):
            classify(remote, small)
    assert classify(changed, hf(tmp_path / "c", normalizer=normalizer)).kind == "identity"
    composed = hf(tmp_path / "d", normalizer={"type": "NFC"})
    assert composed.normalisers == ("NFC",)
    assert classify(composed, plain).kind == "bridge"


def test_what_cannot_be_aligned_names_both_sides(tmp_path: Path) -> None:
    letters = Vocabulary.from_bytes([b"a", b"b", b"<|end|>"], control={2: Role.END_OF_TURN}, order=[0, 1], name="letters")
    whole = ranked(TOKENS, name="whole")
    with pytest.raises(TokenizerMismatch, match=r"letters beside whole has no usable bytes"):
        classify(whole, letters)
    for first, second, names in ((words(), whole, "words beside whole"), (whole, words(), "words beside whole")):
        with pytest.raises(TokenizerMismatch, match=f"{names}: a WordPiece tokenizer has no usable bytes") as caught:
            classify(first, second)
        assert "byte-level BPE" in caught.value.hint
    endless = Vocabulary.from_bytes([*TOKENS, b"<x>"], control={len(TOKENS): Role.OTHER}, order=range(len(TOKENS)), name="endless")
    for remote, small in ((endless, ranked([*TOKENS, b"ab"], name="whole")), (ranked([*TOKENS, b"ab"], name="whole"), endless)):
        with pytest.raises(TokenizerMismatch, match=r"endless.*whole|whole.*endless") as caught:
            classify(remote, small)
        assert "eos_token" in caught.value.hint


def words() -> Vocabulary:
    """A tokenizer of words and marked parts of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return Vocabulary.from_hf(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[UNK]"), name="words")


def closed_vocabulary() -> Vocabulary:
    return Vocabulary.from_bytes([*TOKENS, b"<|end|>"], control={len(TOKENS): Role.END_OF_TURN}, name="closed")


def test_an_unknown_splitting_leaves_one_path() -> None:
    fit = classify(closed_vocabulary(), ranked(TOKENS))
    assert (fit.kind, fit.boundaries) == ("path", None)


@pytest.mark.parametrize("normalizer", CHANGING)
def test_normalisers_are_refused_beside_a_closed_tokenizer(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    with pytest.raises(TokenizerMismatch, match="the small model's tokenizer changed beside closed changes every"):
        classify(closed_vocabulary(), hf(tmp_path, normalizer=normalizer))
    with pytest.raises(TokenizerMismatch, match="words beside closed: a WordPiece tokenizer has no usable bytes"):
        classify(closed_vocabulary(), words())
    letters = Vocabulary.from_bytes([b"a", b"b", b"<|end|>"], control={2: Role.END_OF_TURN}, order=[0, 1], name="letters")
    with pytest.raises(TokenizerMismatch, match=r"letters beside closed has no usable bytes"):
        classify(closed_vocabulary(), letters)


@pytest.mark.parametrize("wanted", ["bridge", "bridge-exact", "path"])
def test_what_changes_texts_is_refused_where_a_bridge_is_asked_for(tmp_path: Path, wanted: Any) -> None:
    """Two tokenizers that change texts alike are an identity; their bytes are not what was written all the same."""
    tiny.tiny_tokenizer(tmp_path)
    tokenizer = tiny.lowering(tmp_path)
    remote = Vocabulary.from_hf(str(tokenizer))
    assert align(remote, str(tokenizer), fingerprint=remote.fingerprint).mode == "identity"
    with pytest.raises(TokenizerMismatch, match="changes every text") as caught:
        align(remote, str(tokenizer), fingerprint=remote.fingerprint, wanted=wanted)
    assert str(caught.value).count(str(tmp_path)) == 2, "both sides are named"


def test_verdicts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULD_CACHE", str(tmp_path))
    remote, small = ranked(TOKENS), ranked(TOKENS, shift=3)
    assert kind_of(remote, small) == "permutation"
    kept = json.loads((tmp_path / "alignments.json").read_text(encoding="utf-8"))
    assert list(kept.values()) == ["permutation"]
    (tmp_path / "alignments.json").write_text(json.dumps({key: "bridge" for key in kept}), encoding="utf-8")
    assert kind_of(remote, small) == "bridge", "what was found before is not compared again"
    (tmp_path / "alignments.json").write_text("not json", encoding="utf-8")
    assert kind_of(remote, small) == "permutation"


def test_a_verdict_holds_for_the_same_ends_and_normalisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers of one fingerprint may end answers by other tokens, or by none."""
    monkeypatch.setenv("ULD_CACHE", str(tmp_path))
    remote, small = ranked(TOKENS), ranked([*TOKENS, b"ab"])
    assert kind_of(remote, small) == "bridge"
    endless = replace(small, roles=dict.fromkeys(small.roles, Role.OTHER))
    lowered = replace(small, normalisers=("Lowercase",))
    assert endless.fingerprint == lowered.fingerprint == small.fingerprint
    with pytest.raises(TokenizerMismatch, match="no token that ends an answer"):
        kind_of(remote, endless)
    with pytest.raises(TokenizerMismatch, match="changes every text"):
        kind_of(remote, lowered)
    assert len(json.loads((tmp_path / "alignments.json").read_text(encoding="utf-8"))) == 1


@pytest.mark.parametrize(
    ("remote", "small", "kind"),
    [
        ("mistral1", "mistral3", "permutation"), ("llama3", "llama3", "identity"), ("cl100k", "llama3", "bridge"),
        ("gpt2", "p50k", "bridge"), ("llama3", "qwen", "bridge"), ("qwen", "smollm2", "bridge"), ("tekken", "llama3", "bridge"),
    ],
)  # fmt: skip
def test_real_pairs(remote: str, small: str, kind: str) -> None:
    first, second = installed(remote), installed(small)
    fit = classify(first, second)
    assert fit.kind == kind
    assert fit.boundaries is not None
    if kind == "bridge":
        assert 0.3 < fit.boundaries < 1.0


def test_the_rows_of_the_head_lie_beside_the_tokenizer(tmp_path: Path, tiny_target: Path, tiny_gguf: Path) -> None:
    assert open_vocabulary(tiny_target).head_rows == open_vocabulary(tiny_gguf).head_rows == open_vocabulary(tiny_target).rows
    folder = shutil.copytree(tiny_target, tmp_path / "padded")
    for content, rows in (('{"text_config": {"vocab_size": 448}}', 448), ('{"text_config": null, "vocab_size": "x"}', 0)):
        (folder / "config.json").write_text(content, encoding="utf-8")
        assert open_vocabulary(folder).head_rows == rows
    shutil.copy(tiny_target / "config.json", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 448}), encoding="utf-8")
    assert (open_vocabulary(folder).head_rows, open_vocabulary(folder).rows) == (448, 400)
    (folder / "config.json").unlink()
    assert open_vocabulary(folder).head_rows == 0


def test_any_tokenizer_file_opens(tmp_path: Path, tiny_target: Path, tiny_gguf: Path) -> None:
    folder = open_vocabulary(str(tiny_target))
    assert open_vocabulary(tiny_target / "tokenizer.json").tokens == folder.tokens
    assert open_vocabulary(tiny_gguf).tokens == folder.tokens
    assert open_vocabulary(folder) is folder
    wrong = tmp_path / "wrong.json"
    for content in ("[1]", "{", '{"model": 3}', '{"model": {"type": "BPE"}}'):
        wrong.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match=r"wrong\.json is no tokenizer file"):
            open_vocabulary(wrong)
    with pytest.raises(UsageError, match=r"there is no file nowhere\.model"):
        open_vocabulary("nowhere.model")
    for path in ("./nowhere", "/nowhere/at/all", "one/two/three"):
        with pytest.raises(UsageError, match="there is no file or folder"):
            open_vocabulary(path)


@pytest.mark.parametrize("open_it", [open_vocabulary, open_tokenizer])
def test_both_ways_to_open_know_a_file_by_its_content(tmp_path: Path, tiny_target: Path, open_it: Any) -> None:
    """Llama 3's tokenizer.model holds ranks, that of Llama 2 a SentencePiece model; and a tekken file may have any name."""
    for name in ("tokenizer.model", "unknown.tiktoken"):
        with pytest.raises(UsageError, match=re.escape(f"{name} is a rank file of an unknown encoding")) as caught:
            open_it(rank_file(tmp_path / name, ranks_of([])))
        assert "give the model's tokenizer.json" in caught.value.hint, "which works on the command line"
        assert "Vocabulary.from_tiktoken(file, pattern=" in caught.value.hint
    (tmp_path / "tokenizer.model").write_bytes(b" \n")
    with pytest.raises(UsageError, match=r"tokenizer\.model is no SentencePiece model"):
        open_it(tmp_path)
    tokens = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"pattern": ".", "default_vocab_size": 259, "default_num_special_tokens": 3}
    tekken = tmp_path / "tekken_240911.json"
    tekken.write_text(json.dumps({"config": config, "vocab": tokens}), encoding="utf-8")
    assert open_it(tekken).encode("a") == [3 + ord("a")]
    ids = open_it(tiny_target).encode("the sea")
    assert open_it(tiny_target / "tokenizer.json").encode("the sea") == ids
    alone = tmp_path / "alone.json"
    alone.write_bytes((tiny_target / "tokenizer.json").read_bytes())
    assert open_it(alone).encode("the sea") == ids


def test_tokens_that_nobody_sees_are_told_by_escapes() -> None:
    """SentencePiece has bytes as tokens beside the characters that they are, which it writes instead."""
    tokens = [*LETTERS, b"\x01", "é".encode()]
    control = {len(tokens): Role.END_OF_TURN}
    remote = Vocabulary.from_bytes([*tokens, b"<|end|>"], control=control, order=range(256), name="remote")
    fit = classify(remote, ranked(TOKENS))
    assert fit.neutral == (("\\x01", "never written by its own tokenizer"), ("é", "never written by its own tokenizer"))


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_published_rank_files_are_known(name: str) -> None:
    known = installed(name)
    opened = open_vocabulary(known.name)
    assert [opened.encode(text) for text in CORPUS] == [known.encode(text) for text in CORPUS]
    assert {known.tokens[i]: role for i, role in known.roles.items() if role is not Role.OTHER}.items() <= {
        opened.tokens[i]: role for i, role in opened.roles.items()
    }.items()
    assert classify(opened, known).kind == "identity"
