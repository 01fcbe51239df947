"""Tokenizer files as vocabularies: SentencePiece models, Mistral's tekken, and how a transformers tokenizer spells."""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_adapters.errors import MissingExtra, TokenizerMismatch, UsageError
from uld_adapters.vocabulary.bpe import Bpe, implied_merges
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.spelling import Spelling, Unigram, plain
from uld_adapters.vocabulary.words import Atoms, Pattern, PreTokenizer, Words, by_neighbours, whole

_MARKER = re.compile(r"\[[A-Z0-9_/]+\]")  # control tokens in all but name, such as [REFERENCE_DOC_0]
SPACE = "▁"  # how SentencePiece writes a space


def cut_by(pattern: str | None, *, whose: str) -> Words:
    """Words by the pattern of a vocabulary named `whose`, uncut without one; raises UsageError for what is no regular expression."""
    import regex

    try:
        return whole if pattern is None else Pattern(pattern)
    except regex.error as error:
        raise UsageError(
            f"the pattern of {whose or 'the vocabulary'} is no regular expression: {error}", hint="give it as the tokenizer's authors do"
        ) from error


def ranked_spelling(tokens: Sequence[bytes], order: Sequence[int], words: Words, *, start: bytes = b"") -> Spelling:
    """Spelling of a vocabulary whose tokens merge in the given order, from single bytes."""
    ids = {token: tokens[token] for token in order}
    atoms = {data: token for data, token in plain(ids).items() if len(data) == 1}
    return Spelling(words, Bpe(len(tokens), atoms, implied_merges(tokens, order), whole=plain(ids)), start)


def check_ids(rows: int, control: Mapping[int, Role], order: Sequence[int]) -> None:
    """Raise `UsageError` for control tokens and an order that do not belong to a vocabulary of so many tokens."""
    for name, ids in (("control", control), ("order", order)):
        if (wrong := next((token for token in ids if not 0 <= token < rows), None)) is not None:
            raise UsageError(f"{name} has the id {wrong}, and there are {rows} tokens", hint="give ids that are places in the tokens")
    if (role := next((role for role in control.values() if not isinstance(role, Role)), None)) is not None:
        known = ", ".join(f"Role.{name}" for name in Role.__members__)
        raise UsageError(f"control has {role!r}, which is no role", hint=f"choose one of {known}")


def tekken_parts(path: Path) -> tuple[list[bytes], int, str, dict[str, int]]:
    """Tokens by id (the control tokens first), how many control tokens there are, the pattern, and the control tokens' names."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        config = value["config"]
        special, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        names = {int(entry["rank"]): str(entry["token_str"]) for entry in value.get("special_tokens") or ()}
        if not names:
            names = dict(enumerate(("<unk>", "<s>", "</s>")))
        names = {i: names.get(i, f"<SPECIAL_{i}>") for i in range(special)}
        if not 0 <= special < size <= special + len(value["vocab"]):
            raise ValueError(f"{special} control tokens and {len(value['vocab'])} others make no vocabulary of {size}")
        inner = sorted(value["vocab"], key=lambda entry: entry["rank"])[: size - special]
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in inner]
        return [*(name.encode() for name in names.values()), *tokens], special, str(config["pattern"]), {n: i for i, n in names.items()}
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise UsageError(f"{path} is no tekken file: {error}", hint="give the tekken.json of a Mistral model") from error


def sentencepiece_parts(path: Path) -> tuple[list[bytes], dict[str, int], Spelling, tuple[str, ...]]:
    """Tokens by id, control tokens by name, how they spell, and normalisers that change a text."""
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "hf") from error
    blob = path.read_bytes()
    proto = schema.ModelProto()
    try:
        if not blob:
            raise ValueError("it is empty")
        proto.ParseFromString(blob)
        SentencePieceProcessor(model_proto=blob)
    except Exception as error:  # protobuf and SentencePiece raise classes of their own
        raise UsageError(f"{path} is no SentencePiece model: {error}", hint="give the tokenizer.model of the model") from error
    kinds = schema.ModelProto.SentencePiece
    tokens: list[bytes] = []
    control: dict[str, int] = {}
    order: list[int] = []
    atomic: dict[bytes, int] = {}
    fallback: dict[bytes, int] = {}
    for token, piece in enumerate(proto.pieces):
        data = piece.piece.replace(SPACE, " ").encode()
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN) or (piece.type == kinds.USER_DEFINED and _MARKER.fullmatch(piece.piece)):
            data = piece.piece.encode()
            control[piece.piece] = token
        elif piece.type == kinds.BYTE:
            data = bytes([int(piece.piece[3:5], 16)])
            fallback[data] = token
        elif piece.type == kinds.USER_DEFINED:
            atomic[data] = token
        elif piece.type == kinds.NORMAL:
            order.append(token)
        tokens.append(data)
    rules = proto.normalizer_spec
    named = rules.name not in ("identity", "")
    changes = (rules.name.upper(),) if named else ("rules without a name",) if rules.precompiled_charsmap else ()
    if rules.remove_extra_whitespaces:
        changes = (*changes, "remove_extra_whitespaces")
    words = with_atoms(by_neighbours(tokens[token] for token in order), atomic)
    start = b" " if rules.add_dummy_prefix else b""
    if proto.trainer_spec.model_type == schema.TrainerSpec.BPE:
        single = {token for token in order if len(proto.pieces[token].piece) == 1}
        order.sort(key=lambda token: (token not in single, -proto.pieces[token].score))
        atoms = fallback | {tokens[token]: token for token in single}
        return tokens, control, Spelling(words, Bpe(len(tokens), atoms, implied_merges(tokens, order), whole=atomic), start), changes
    return tokens, control, Spelling(words, Unigram(_Pieces(proto), tuple(tokens), SPACE), start), changes


class _Piece:
    def __init__(self, number: int) -> None:
        self.id = number


class _Pieces:
    """SentencePiece's own search in the form of a `tokenizers` model."""

    def __init__(self, proto: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        proto.normalizer_spec.add_dummy_prefix = False
        self._model = SentencePieceProcessor(model_proto=proto.SerializeToString())

    def tokenize(self, text: str) -> list[_Piece]:
        """The pieces of a text whose spaces are written as SentencePiece does."""
        return [_Piece(i) for i in self._model.encode(text.replace(SPACE, " "))]


def with_atoms(words: Words, atomic: Mapping[bytes, int]) -> Words:
    """Words, with certain strings always words of their own, the longest first."""
    return Atoms(words, [data.decode(errors="replace") for data in atomic]) if atomic else words


def hf_normalisers(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a normaliser in order."""
    return _flat(state.get("normalizer"), "normalizers")


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return [found for part in step[inner] for found in _flat(part, inner)] if step["type"] == "Sequence" else [step]


def changes_text(step: Mapping[str, Any]) -> bool:
    """Whether a normaliser does more than to write spaces as SentencePiece does."""
    if step["type"] == "Prepend":
        return False
    return not (step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE)


def hf_spelling(state: Mapping[str, Any], tokens: Sequence[bytes], alphabet: Mapping[str, int], atomic: Mapping[bytes, int]) -> Spelling:
    """How a transformers fast tokenizer spells, from its serialised state; `alphabet` is that of byte-level BPE, empty for others."""
    model = state["model"]
    kind = model.get("type")
    if kind not in ("BPE", "Unigram") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerMismatch(
            f"a tokenizer of kind {kind} with marked word parts has no usable bytes" if kind == "BPE" else
            f"a {kind} tokenizer has no usable bytes: a text cannot be rebuilt from its tokens",
            hint="use a model with byte-level BPE, SentencePiece, tiktoken or tekken tokens",
        )  # fmt: skip
    steps = _flat(state.get("pre_tokenizer"), "pretokenizers")
    written = [step["content"] for step in hf_normalisers(state) if step["type"] == "Replace" and not changes_text(step)]
    start = _start(state, steps)
    words = _hf_words(steps, space=written[0] if written else " ") or by_neighbours(tokens)
    words = with_atoms(words, atomic)
    if kind == "Unigram":
        return Spelling(words, Unigram(_hf_model(state), tuple(tokens), SPACE), start)
    vocab: dict[str, int] = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merges = [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    if alphabet:
        atoms = {bytes([byte]): vocab[char] for char, byte in alphabet.items() if char in vocab}
    else:
        atoms = {bytes([byte]): vocab[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in vocab}
        atoms |= {tokens[token]: token for piece, token in vocab.items() if len(piece) == 1}
    special = {token["id"] for token in state["added_tokens"] if token["special"]}  # a GGUF file lists them among the words
    whole = {tokens[token]: token for token in vocab.values() if token not in special} if model.get("ignore_merges") else {}
    return Spelling(words, Bpe(len(tokens), atoms, merges, whole=whole | dict(atomic)), start)


def _start(state: Mapping[str, Any], steps: list[dict[str, Any]]) -> bytes:
    """The space that the tokenizer puts before every text."""
    before = any(step["type"] == "Prepend" for step in hf_normalisers(state))
    before |= any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in steps)
    before |= any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)
    return b" " if before else b""


def _hf_words(steps: list[dict[str, Any]], *, space: str) -> Words | None:
    quiet = [{**step, "add_prefix_space": False} if step["type"] == "ByteLevel" else step for step in steps]
    quiet = [{**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step for step in quiet]
    if not quiet or all(step["type"] == "Metaspace" and not step.get("split", True) for step in quiet):
        return None
    tokenizer = _hf_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": quiet}})
    return PreTokenizer(tokenizer.pre_tokenizer, space=space)


def _hf_model(state: Mapping[str, Any]) -> Any:
    return _hf_tokenizer({"model": state["model"]}).model


def _hf_tokenizer(parts: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(json.dumps({**empty, **parts}))
