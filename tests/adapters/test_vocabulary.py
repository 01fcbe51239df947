"""Vocabularies read from every kind of tokenizer file spell texts as the library of that kind does."""

import base64
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from rank_files import rank_file, ranks_of
from real_tokenizers import NAMES, installed
from uld_adapters.errors import TokenizerMismatch, UsageError
from uld_adapters.vocabulary.control import Role, matched
from uld_adapters.vocabulary.fingerprint import CORPUS, letters_changed
from uld_adapters.vocabulary.plain_tokenizer import PlainTokenizer
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer
from uld_adapters.vocabulary.words import readable

POOL = [*"abcdeTHE 'sreXY0123456789.,;:!?()[]{}/\\\n\r\t\"-_=", "  ", "    ", "\r\n", "é", "e\u0301", "漢", "字", "😀", "👩‍👩‍👧", "🏳️‍🌈"]
POOL += ["Ω", "ж", "ع", "한", "'ll", "n't", " the", " and", "ing", "１", "\u00a0", "\u2028", "—", "<s>", "</s>", "<|user|>"]
TEXTS = st.lists(st.sampled_from(POOL), max_size=30).map("".join)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(tiny.CORPUS * 20), encoding="utf-8")
    found = {}
    for kind in ("bpe", "unigram"):
        trainer.train(
            input=str(corpus), model_prefix=str(folder / kind), vocab_size=400, model_type=kind, byte_fallback=True, hard_vocab_limit=False,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, user_defined_symbols=["<|user|>"],
        )  # fmt: skip
        found[kind] = folder / f"{kind}.model"
    return found


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_a_transformers_tokenizer_spells_as_itself(tiny_target: Path, text: str) -> None:
    tokenizer, vocabulary = _tiny(tiny_target)
    if not any(str(name) in text for name in tiny.SPECIALS):  # a text is never read as control tokens
        assert vocabulary.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def _tiny(folder: Path, kept: dict = {}) -> tuple:  # type: ignore[type-arg]  # noqa: B006
    if folder not in kept:
        tokenizer = load_tokenizer(folder)
        kept[folder] = tokenizer, Vocabulary.from_hf(tokenizer)
    return kept[folder]


def test_control_tokens_have_roles(tiny_target: Path) -> None:
    _, vocabulary = _tiny(tiny_target)
    by_name = {vocabulary.tokens[i].decode(): role for i, role in vocabulary.roles.items()}
    assert by_name["<|eos|>"] is Role.END_OF_TURN, "the template ends an answer with it"
    assert by_name["<|user|>"] is Role.OTHER
    assert vocabulary.rows == 400
    assert vocabulary.normalisers == ()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_sentencepiece_models(sentencepiece_model: dict[str, Path], kind: str, text: str) -> None:
    from sentencepiece import SentencePieceProcessor

    vocabulary = _pieces(sentencepiece_model[kind])
    library = SentencePieceProcessor(model_file=str(sentencepiece_model[kind]))
    head = library.encode("\n")
    assert vocabulary.encode(text) == library.encode("\n" + text)[len(head) :]
    assert vocabulary.spelling is not None
    assert vocabulary.spelling.start == b" "


def _pieces(path: Path, kept: dict = {}) -> Vocabulary:  # type: ignore[type-arg]  # noqa: B006
    if path not in kept:
        kept[path] = Vocabulary.from_sentencepiece(path)
    return kept[path]


def test_rank_files(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranks_of([b" the", b"there", b"her", b"re", b"  ", "é".encode(), b"ab", b"bc", b"abc"])
    file = rank_file(tmp_path / "small.tiktoken", tokens)
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    vocabulary = Vocabulary.from_tiktoken(file, pattern=pattern, control={"<|endoftext|>": len(tokens) + 2})
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
    rng = random.Random(0)
    for text in [*CORPUS, *("".join(rng.choices(POOL, k=12)) for _ in range(300))]:
        assert vocabulary.encode(text) == encoding.encode_ordinary(text)
    assert vocabulary.roles[len(tokens) + 2] is Role.END_OF_TEXT
    assert vocabulary.rows == len(tokens) + 3, "ids without a token are rows of the head too"
    assert len(tokens) in vocabulary.control
    assert Vocabulary.from_tiktoken(encoding).encode(CORPUS[0]) == vocabulary.encode(CORPUS[0])


def test_tekken_files(tmp_path: Path) -> None:
    tokens = ranks_of([b" the", b"there"])
    config = {"pattern": r" ?\p{L}+|[^\p{L}]", "default_vocab_size": len(tokens) + 10, "default_num_special_tokens": 10}
    entries = [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for rank, token in enumerate(tokens)]
    unused = [{"rank": len(tokens), "token_bytes": base64.b64encode(b"zzz").decode(), "token_str": None}]
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": entries + unused}), encoding="utf-8")
    vocabulary = Vocabulary.from_tekken(file)
    assert [vocabulary.tokens[i] for i in vocabulary.encode("there the")] == [b"there", b" the"]
    assert vocabulary.rows == len(tokens) + 10, "ranks beyond the size are not used"
    assert vocabulary.tokens[10 + 97] == b"a", "ids are shifted by the control tokens"
    assert vocabulary.roles[2] is Role.END_OF_TEXT


def test_known_bytes_without_a_spelling() -> None:
    closed = Vocabulary.from_bytes([b"a", b"b", b"<end>"], control={2: Role.END_OF_TEXT}, name="closed")
    assert closed.decode([0, 1, 2]) == b"ab"
    with pytest.raises(TokenizerMismatch, match="closed splits text"):
        closed.encode("ab")
    opened = Vocabulary.from_bytes([b"a", b"b", b"ab", b"<end>"], control={3: Role.END_OF_TEXT}, order=[0, 1, 2])
    assert opened.encode("aab") == [0, 2]
    assert opened.fingerprint != closed.fingerprint


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"caf\xc3", "caf\u00c0"), (b"\xf0\x9f\x98", "\U0001f600"), (b"a\xffb", "a\uf7ffb"), (b"\xa9x", "\uf7a9x"), (b"\xe0", "\u0800")],
)
def test_bytes_that_are_no_text_are_readable(data: bytes, text: str) -> None:
    found, widths = readable(data)
    assert found == text
    assert sum(widths) == len(data)
    assert len(widths) == len(found)


def test_control_tokens_are_matched_by_name_then_role() -> None:
    llama = {0: Role.END_OF_TEXT, 1: Role.END_OF_TURN, 2: Role.OTHER}
    qwen = {7: Role.END_OF_TEXT, 8: Role.END_OF_TURN}
    names = {0: b"<|end_of_text|>", 1: b"<|eot_id|>", 2: b"<|python_tag|>", 7: b"<|endoftext|>", 8: b"<|im_end|>"}
    assert matched(llama, qwen, names, names) == {0: 7, 1: 8}
    assert matched(llama, {7: Role.END_OF_TEXT}, names, names) == {1: 7}, "the one end there is ends turns"
    assert matched({1: Role.END_OF_TURN}, llama, names, names) == {1: 1}


def test_of_several_ends_the_one_that_answers_end_with_is_matched() -> None:
    """Llama 3's <|eom_id|>, after which a tool answers, has a lower id than its <|eot_id|>; Phi's </s> one than its <|endoftext|>."""
    llama = {0: Role.END_OF_TEXT, 8: Role.END_OF_TURN, 9: Role.END_OF_TURN}
    qwen = {3: Role.END_OF_TEXT, 5: Role.END_OF_TURN}
    names = {0: b"<|end_of_text|>", 8: b"<|eom_id|>", 9: b"<|eot_id|>", 3: b"<|endoftext|>", 5: b"<|im_end|>"}
    assert matched(llama, qwen, names, names) == {0: 3, 9: 5}
    assert matched(qwen, llama, names, names) == {3: 0, 5: 9}
    phi = {2: Role.END_OF_TEXT, 7: Role.END_OF_TEXT}
    assert matched({0: Role.END_OF_TEXT}, phi, names, {2: b"</s>", 7: b"<|endoftext|>"}) == {0: 7}
    told = {8: Role.END_OF_TURN, 9: Role.END_OF_TURN}  # a name of its own, which a chat template ends turns with
    assert matched(told, {5: Role.END_OF_TURN}, {8: b"<|eot_id|>", 9: b"<|stop|>"}, names) == {9: 5}


def test_an_answer_ends_with_the_end_of_turn_that_is_meant_for_it() -> None:
    """Llama 3's <|eom_id|>, which hands over to a tool, has a smaller id than <|eot_id|>."""
    names = [b"a", b"<|end_of_text|>", b"<|eom_id|>", b"<|eot_id|>"]
    roles = {1: Role.END_OF_TEXT, 2: Role.END_OF_TURN, 3: Role.END_OF_TURN}
    assert PlainTokenizer(Vocabulary.from_bytes(names, control=roles)).eos_token_id == 3
    assert PlainTokenizer(Vocabulary.from_bytes(names[:2], control={1: Role.END_OF_TEXT})).eos_token_id == 1
    assert PlainTokenizer(Vocabulary.from_bytes(names[:1])).eos_token_id is None


def test_rules_without_a_name_change_letters_too(sentencepiece_model: dict[str, Path], tmp_path: Path) -> None:
    schema = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = schema.ModelProto()
    proto.ParseFromString(sentencepiece_model["bpe"].read_bytes())
    assert letters_changed(Vocabulary.from_sentencepiece(sentencepiece_model["bpe"]).normalisers) == []
    trainer, folder = pytest.importorskip("sentencepiece").SentencePieceTrainer, tmp_path / "nfkc"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(tiny.CORPUS * 20), encoding="utf-8")
    trainer.train(
        input=str(corpus), model_prefix=str(folder), vocab_size=400, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="nfkc", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    proto.ParseFromString(folder.with_suffix(".model").read_bytes())
    proto.normalizer_spec.name = ""
    nameless = tmp_path / "nameless.model"
    nameless.write_bytes(proto.SerializeToString())
    assert letters_changed(Vocabulary.from_sentencepiece(nameless).normalisers) == ["rules without a name"]


@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies_give_texts_back(name: str) -> None:
    vocabulary = installed(name)
    rng = random.Random(1)
    for text in [*CORPUS, *("".join(rng.choices(POOL, k=20)) for _ in range(100))]:
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"not a tokenizer\x00\xff")
    for read in (Vocabulary.from_tiktoken, Vocabulary.from_tekken, Vocabulary.from_sentencepiece, Vocabulary.from_gguf):
        with pytest.raises(UsageError, match="wrong") as caught:
            read(wrong)
        assert caught.value.hint
    with pytest.raises(TokenizerMismatch, match="tokenizer"):
        Vocabulary.from_hf(tmp_path)
    wrong.write_bytes(b"")
    for read, says in ((Vocabulary.from_sentencepiece, "wrong is no SentencePiece model"), (Vocabulary.from_gguf, "not a readable GGUF")):
        with pytest.raises(UsageError, match=says):
            read(wrong)
    broken = tmp_path / "broken"
    tiny.tiny_tokenizer(broken)
    (broken / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(TokenizerMismatch, match="broken"):
        Vocabulary.from_hf(broken)
    with pytest.raises(UsageError, match=r"the pattern of .*small\.tiktoken is no regular expression: missing \)"):
        Vocabulary.from_tiktoken(rank_file(tmp_path / "small.tiktoken", ranks_of([])), pattern="(")
    unknown = rank_file(tmp_path / "unknown.tiktoken", ranks_of([]))
    with pytest.raises(UsageError, match="unknown encoding"):
        Vocabulary.from_tiktoken(unknown)
    with pytest.raises(UsageError, match="no-such-encoding") as caught:
        Vocabulary.from_tiktoken("no-such-encoding")
    assert "rank file" in caught.value.hint


def test_word_parts_have_no_usable_bytes() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary.from_hf(PreTrainedTokenizerFast(tokenizer_object=raw))
    with pytest.raises(TokenizerMismatch, match="no usable bytes"):
        vocabulary.encode("ab")
