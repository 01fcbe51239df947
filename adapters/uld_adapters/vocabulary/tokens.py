"""A tokenizer as bytes: id -> bytes, control ids, rows, and a fingerprint over them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from uld_adapters.errors import TokenizerMismatch, UsageError
from uld_adapters.gguf_file import Gguf, gguf_tokenizer, is_gguf
from uld_adapters.vocabulary import formats
from uld_adapters.vocabulary.control import Role, roles, template_end
from uld_adapters.vocabulary.fingerprint import CORPUS, fingerprint_of
from uld_adapters.vocabulary.rank_files import tiktoken_parts
from uld_adapters.vocabulary.spelling import Spelling
from uld_adapters.vocabulary.words import utf8

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json", "spiece.model", "vocab.txt")
_LOADABLE = "give a folder with tokenizer.json, a GGUF file or a hub name"
_GIVE_FILE = "pass the tokenizer of the served model: a folder, a GGUF file, a tiktoken, SentencePiece or tekken file"


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level BPE writes for bytes (the GPT-2 convention), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)})
    return alphabet


def _piece_bytes(piece: str, *, byte_level: bool) -> bytes:
    if byte_level:
        alphabet = _byte_alphabet()
        return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens: `tokens[id]` as bytes (control and added tokens as their names), control ids with their roles.

    `head_rows` are those of the model's output head, 0 where nobody knows: what is beyond `rows` is padding, which is masked.
    `normalisers` names the steps that change a text before it is cut (NFC, Lowercase). `atomic` are added tokens that are text but
    are never built by merges. The fingerprint is a SHA-256 over the tokens, the control ids, the segmentation of a fixed corpus and
    whether letters are changed: two tokenizers with one fingerprint are taken for the same, though other texts could still be split
    differently. `spelling` is None where only the tokens are known (a closed tokenizer).
    """

    tokens: tuple[bytes, ...]
    control: frozenset[int]
    fingerprint: str
    roles: Mapping[int, Role] = field(default_factory=dict, compare=False)
    atomic: frozenset[int] = frozenset()
    normalisers: tuple[str, ...] = ()
    name: str = field(default="", compare=False)
    _speller: Callable[[], Spelling] | None = field(default=None, compare=False, repr=False)
    head_rows: int = field(default=0, compare=False)

    @property
    def rows(self) -> int:
        """How many tokens there are, control tokens included."""
        return len(self.tokens)

    @property
    def closed(self) -> bool:
        """Whether it is unknown how a text is spelled in these tokens."""
        return self._speller is None

    @cached_property
    def spelling(self) -> Spelling | None:
        """How a text is spelled in these tokens; made when first asked for, which takes seconds for a large vocabulary."""
        return None if self._speller is None else self._speller()

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, without anything before it; text that looks like a control token is text.

        A normaliser is left out: the ids spell the text as it is written, where a tokenizer with NFC composes e + U+0301 first.
        """
        if self.spelling is None:
            raise TokenizerMismatch(f"it is not known how {self.name or 'this tokenizer'} splits text", hint=_GIVE_FILE)
        return list(self.spelling.encode(utf8(text, what="the text") if isinstance(text, str) else text))

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; control tokens have none."""
        return b"".join(self.tokens[i] for i in ids if i not in self.control)

    @classmethod
    def from_hf(cls, tokenizer: Any, *, name: str = "") -> "Vocabulary":
        """Read a transformers fast tokenizer, or the folder, GGUF file or hub name of one."""
        tokenizer = load_tokenizer(tokenizer)
        if isinstance(own := getattr(tokenizer, "vocabulary", None), cls):  # a PlainTokenizer
            return own
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UsageError(f"{type(tokenizer).__name__} is no fast tokenizer", hint="convert it to tokenizer.json first")
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        byte_level = "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
        added = {int(i): t for i, t in tokenizer.added_tokens_decoder.items()}
        pieces = tokenizer.convert_ids_to_tokens(list(range(rows_of(tokenizer))))
        names = {i: str(token.content) for i, token in added.items()} | {i: f"<unused {i}>" for i, p in enumerate(pieces) if p is None}
        tokens = tuple(names[i].encode() if i in names else _piece_bytes(p, byte_level=byte_level) for i, p in enumerate(pieces))
        control = frozenset(i for i in names if i not in added or added[i].special)
        atomic = frozenset(i for i in added if i not in control)
        alphabet = _byte_alphabet() if byte_level else {}
        ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        changes = tuple(step["type"] for step in formats.hf_normalisers(state) if formats.changes_text(step))
        return cls(
            tokens,
            control,
            fingerprint_of(tokens, control, lambda text: tokenizer.encode(text, add_special_tokens=False), changes),
            roles({i: names[i] for i in control}, ends=ends, turn=template_end(tokenizer)),
            atomic,
            changes,
            name or name_of(tokenizer),
            lambda: formats.hf_spelling(state, tokens, alphabet, {tokens[i]: i for i in atomic}),
        )

    @classmethod
    def from_tiktoken(cls, source: Any, *, pattern: str | None = None, control: Mapping[str, int] | None = None) -> "Vocabulary":
        """Read a tiktoken encoding: its rank file, its name, or an `Encoding`.

        Rank files of r50k, p50k, cl100k, o200k, Llama 3 and Qwen are known by their hash; any other needs the `pattern` that cuts
        words and the ids of its `control` tokens by name. A name may make tiktoken download the file.
        """
        ranks, cut, special = tiktoken_parts(source, pattern, control)
        rows = max([*ranks, *special.values()]) + 1
        names = {number: name for name, number in special.items()}
        tokens = tuple(ranks.get(i, names.get(i, f"<unused {i}>").encode()) for i in range(rows))
        unused = {i: "" for i in range(rows) if i not in ranks and i not in names}
        return cls._ranked(tokens, sorted(ranks), cut, names | unused, str(source if isinstance(source, str | Path) else source.name))

    @classmethod
    def from_tekken(cls, path: str | Path) -> "Vocabulary":
        """Read Mistral's tekken.json."""
        tokens, special, cut, names = formats.tekken_parts(Path(path))
        order = range(special, len(tokens))
        return cls._ranked(tuple(tokens), order, cut, {i: name for name, i in names.items()}, str(path))

    @classmethod
    def _ranked(cls, tokens: tuple[bytes, ...], order: Sequence[int], cut: str | None, names: Mapping[int, str], name: str) -> "Vocabulary":
        spelling = formats.ranked_spelling(tokens, order, formats.cut_by(cut, whose=name))
        return cls._spelled(tokens, names, spelling, (), name)

    @classmethod
    def _spelled(
        cls, tokens: tuple[bytes, ...], names: Mapping[int, str], spelling: Spelling, changes: tuple[str, ...], name: str
    ) -> "Vocabulary":
        control = frozenset(names)
        mark = fingerprint_of(tokens, control, lambda text: list(spelling.encode(text.encode())), changes)
        return cls(tokens, control, mark, roles(names), frozenset(), changes, name, lambda: spelling)

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> "Vocabulary":
        """Read a SentencePiece model (BPE or Unigram)."""
        if not Path(path).is_file():
            raise UsageError(f"there is no file {path}", hint="give the tokenizer.model of the model")
        tokens, control, spelling, changes = formats.sentencepiece_parts(Path(path))
        return cls._spelled(tuple(tokens), {i: name for name, i in control.items()}, spelling, changes, str(path))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Vocabulary":
        """Read the tokenizer of a GGUF file; its head's rows are those of the output tensor."""
        if not Path(path).is_file():
            raise UsageError(f"there is no file {path}", hint="give a .gguf file")
        tensors = Gguf.read(Path(path)).tensors
        head = tensors.get("output.weight") or tensors.get("token_embd.weight")
        return replace(cls.from_hf(gguf_tokenizer(Path(path)), name=str(path)), head_rows=0 if head is None else head.shape[0])

    @classmethod
    def from_bytes(
        cls,
        tokens: Sequence[bytes],
        *,
        control: Mapping[int, Role] | None = None,
        order: Sequence[int] | None = None,
        pattern: str | None = None,
        name: str = "",
    ) -> "Vocabulary":
        """A vocabulary from its tokens as bytes.

        `order` lists the ids that merge into one another, best first, and `pattern` cuts words; without an order it stays unknown
        how the tokenizer splits text. `control` gives the roles of control tokens, whose bytes are their names.
        """
        control = dict(control or {})
        tokens = tuple(bytes(token) for token in tokens)
        formats.check_ids(len(tokens), control, order or ())
        if order is None:
            mark = fingerprint_of(tokens, frozenset(control), lambda text: [])
            return cls(tokens, frozenset(control), mark, control, name=name)
        spelling = formats.ranked_spelling(tokens, order, formats.cut_by(pattern, whose=name))
        known = {data for data in spelling.speller.atoms}  # type: ignore[attr-defined]  # ranked spellings are BPE
        told = [text for text in CORPUS if all(bytes([byte]) in known for byte in text.encode())]
        mark = fingerprint_of(tokens, frozenset(control), lambda text: list(spelling.encode(text.encode())) if text in told else [])
        return cls(tokens, frozenset(control), mark, control, name=name, _speller=lambda: spelling)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over id -> bytes, control ids, the segmentation of a fixed corpus, and whether letters are changed."""
    return Vocabulary.from_hf(tokenizer).fingerprint


def rows_of(tokenizer: Any) -> int:
    """How many ids a tokenizer has up to the largest; some of them may stand for nothing, as between cl100k's control tokens."""
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(len(tokenizer), 1 + max(known.values(), default=-1))


def name_of(tokenizer: Any) -> str:
    """Where a tokenizer comes from, for messages; empty where nobody knows."""
    own = getattr(tokenizer, "vocabulary", None)
    return str(getattr(tokenizer, "name_or_path", "")) if own is None else str(own.name)


def load_tokenizer(source: Any) -> Any:
    """A transformers fast tokenizer from an object, a folder, a GGUF file or a hub name."""
    if not isinstance(source, str | Path):
        return source
    from transformers import AutoTokenizer

    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise TokenizerMismatch(f"there is no tokenizer in the folder {path}", hint=_LOADABLE)
    try:
        if is_gguf(path):
            return gguf_tokenizer(path)
        return AutoTokenizer.from_pretrained(str(source))
    except UsageError:
        raise
    except Exception as error:  # transformers and tokenizers raise what comes to hand, a bare Exception among it
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip()
        told = "transformers can read none of its files" if reason.endswith(":") else reason  # the head of a list
        raise TokenizerMismatch(f"no tokenizer could be loaded from {str(source)!r}: {told}", hint=_LOADABLE) from error


def end_token_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: the end token and the end-of-turn tokens that chat templates use."""
    names: Sequence[str] = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    vocabulary = tokenizer.get_added_vocab()
    ids.update(vocabulary[name] for name in names if name in vocabulary)
    return frozenset(ids)
