"""How two vocabularies belong together: identity, permutation, or nothing but the bytes of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from uld_adapters.errors import TokenizerMismatch
from uld_adapters.vocabulary.bpe import Bpe
from uld_adapters.vocabulary.control import Role, matched
from uld_adapters.vocabulary.fingerprint import CORPUS, letters_changed
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_adapters.vocabulary.words import utf8

Kind = Literal["identity", "permutation", "bridge", "path"]
# Beside the corpus: what tokenizers are known to split differently.
_NASTY = (
    *CORPUS,
    "1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890 12345678901 123456789012",
    "I'm you're WE'VE they'll he'd it's O'Neill 'tis rock'n'roll",
    "\t\tif (a == b)  {\r\n\t\t    return c;\r\n\t}\n\n\n    # end   \n",
    "HTTPServer fooBarBaz snake_case __init__ ÉCOLE naïve Straße ﬁn ½ ² ① Ａ１",
    "👍🏽👩‍🚀🇩🇪 e\u0301 o\u0308 \u1100\u1161 ก็ नमस्ते ﷽ \u200b\u00a0\u2028",
    "<|im_start|>user\nHello<|im_end|> [INST]<<SYS>> </s><|eot_id|>",
)
_SMALL = "the small model"


@dataclass(frozen=True)
class Fit:
    """How two vocabularies belong together.

    `shared` is the share of the remote's text tokens that the small side has too, by bytes; `boundaries` the share of the ends of
    the remote's tokens, on a text, at which a token of the small side ends too. `neutral` names what has no counterpart, and why,
    `closed` the sides of which it is not known how they split text.
    """

    kind: Kind
    remote: str
    small: str
    shared: float
    boundaries: float | None
    neutral: tuple[tuple[str, str], ...]
    closed: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What the kind means, in words."""
        reading = "nothing can be read" if _SMALL in self.closed else "one spelling a token, approximate"
        return {
            "identity": "the same tokens under the same ids",
            "permutation": "the same tokens under other ids: values are gathered",
            "bridge": "other tokens: the small model's probabilities are summed over its own spellings",
            "path": f"it is not known how {' or '.join(self.closed)} splits text: {reading}",
        }[self.kind]


def classify(remote: Vocabulary, small: Vocabulary, *, text: str | None = None) -> Fit:
    """Compare two vocabularies by bytes, by their merges and by how they split a nasty corpus, and `text`.

    Raises TokenizerMismatch where nothing can be compared: normalisers that change letters, no bytes, no end of an answer.
    """
    kind = _kind(remote, small)
    if kind in ("bridge", "path"):
        require_bytes(remote, small)
    require_ends(remote, small)
    ours = {data for token, data in enumerate(small.tokens) if token not in small.control}
    theirs = [data for token, data in enumerate(remote.tokens) if token not in remote.control and data]
    shared = sum(data in ours for data in theirs) / max(1, len(theirs))
    boundaries = None if kind == "path" else aligned_share(remote, small, "\n".join(_NASTY) if text is None else text)
    names = (remote.name or "the remote's tokenizer", small.name or "the small model's tokenizer")
    closed = tuple(side for side, mine in (("the remote", remote), (_SMALL, small)) if mine.closed)
    return Fit(kind, *names, shared, boundaries, tuple(_neutral(remote, small, kind)), closed)


def _kind(remote: Vocabulary, small: Vocabulary) -> Kind:
    if remote.fingerprint == small.fingerprint:
        return "identity"
    _require_spellings(remote, small)
    if remote.spelling is None or small.spelling is None:
        return "path"
    texts = [{data: token for token, data in enumerate(v.tokens) if token not in v.control and data} for v in (remote, small)]
    if texts[0].keys() != texts[1].keys() or remote.normalisers != small.normalisers:
        return "bridge"
    theirs, ours = remote.spelling.speller, small.spelling.speller
    if isinstance(theirs, Bpe) and isinstance(ours, Bpe) and theirs.order(remote.tokens) != ours.order(small.tokens):
        return "bridge"
    if any(pieces(remote, nasty) != pieces(small, nasty) for nasty in _NASTY):
        return "bridge"
    same = all(small.tokens[token : token + 1] == (data,) for token, data in enumerate(remote.tokens) if token not in remote.control)
    return "identity" if same else "permutation"


def pieces(vocabulary: Vocabulary, text: str | bytes) -> list[bytes]:
    """The bytes of the tokens that spell a text."""
    return [vocabulary.tokens[token] for token in vocabulary.encode(text)]


def require_bytes(remote: Vocabulary, small: Vocabulary) -> None:
    """Raise TokenizerMismatch where the two cannot be compared by bytes, as a bridge or a single path does; it names both.

    Of a remote whose splitting is unknown only what is known of it is looked at.
    """
    _require_spellings(remote, small)
    for mine, about in _sides(remote, small):
        if changes := letters_changed(mine.normalisers):
            raise TokenizerMismatch(
                f"{about} changes every text before it splits it ({', '.join(changes)}): its tokens do not spell what was written",
                hint="use a small model with the same tokenizer"
                if mine is remote
                else "use a small model whose tokenizer keeps texts as they are (byte-level BPE, SentencePiece with identity)",
            )
        if missing := [byte for byte in _unspelled(mine) if byte not in _UNUSED]:
            raise TokenizerMismatch(
                f"{about} has no usable bytes: {len(missing)} bytes have no token, the first is 0x{missing[0]:02X}",
                hint="use a model whose tokenizer has a token for each byte (byte-level BPE, or byte fallback)",
            )


def require_ends(remote: Vocabulary, small: Vocabulary) -> None:
    """Raise TokenizerMismatch, which names both, where one side has no token that ends an answer; what is one tokenizer needs none."""
    if remote.fingerprint == small.fingerprint:
        return
    for mine, about in _sides(remote, small):
        if not any(role is not Role.OTHER for role in mine.roles.values()):
            raise TokenizerMismatch(
                f"{about} has no token that ends an answer",
                hint="give the model's folder, with an eos_token in tokenizer_config.json, or a tiktoken file read with control=",
            )


def _sides(remote: Vocabulary, small: Vocabulary) -> list[tuple[Vocabulary, str]]:
    """Each side, and how an error names it beside the other."""
    named = ((remote, "the remote's", small), (small, "the small model's", remote))
    return [
        (mine, f"{whose} tokenizer {mine.name} beside {other.name or 'an unnamed one'}".replace("  ", " ")) for mine, whose, other in named
    ]


def _require_spellings(remote: Vocabulary, small: Vocabulary) -> None:
    for mine, about in _sides(remote, small):
        try:
            mine.spelling  # noqa: B018  # made when first asked for
        except TokenizerMismatch as error:
            raise TokenizerMismatch(f"{about}: {error.message}", hint=error.hint) from error


# Control characters, planes without characters, and what is never part of UTF-8: texts do without.
_UNUSED = frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - set(b"\t\n\r"))


def _unspelled(vocabulary: Vocabulary) -> bytes:
    return b"" if vocabulary.spelling is None else vocabulary.spelling.speller.unspelled


def spelled_by_both(remote: Vocabulary, small: Vocabulary, text: str) -> bytes:
    """A text without the bytes for which one side has no token."""
    return utf8(text, what="the text").translate(None, _unspelled(remote) + _unspelled(small))


def aligned_share(remote: Vocabulary, small: Vocabulary, text: str) -> float:
    """The share of the ends of the remote's tokens, in what both can spell of a text, at which one of the small side's tokens ends."""
    data = spelled_by_both(remote, small, text)
    ends, others = (_ends(pieces(v, data)) for v in (remote, small))
    return sum(end in others for end in ends) / max(1, len(ends))


def _ends(pieces: Sequence[bytes]) -> dict[int, None]:
    at = 0
    found: dict[int, None] = {}
    for piece in pieces:
        at += len(piece)
        found[at] = None
    return found


def _neutral(remote: Vocabulary, small: Vocabulary, kind: Kind) -> list[tuple[str, str]]:
    control = matched(remote.roles, small.roles, remote.tokens, small.tokens)
    named = ((token, remote.tokens[token].decode(errors="replace")) for token in sorted(remote.control))
    found = [(name or f"id {token}", "a control token without a counterpart") for token, name in named if token not in control]
    if kind == "bridge":
        texts = ((token, data) for token, data in enumerate(remote.tokens) if token not in remote.control)
        found += [(_shown(data), "bytes that the small side cannot spell") for _, data in texts if set(data) & set(_unspelled(small))]
    if kind in ("bridge", "path") and remote.spelling is not None and isinstance(remote.spelling.speller, Bpe):
        speller = remote.spelling.speller
        usable = speller.reachable | set(speller.whole.values())
        never = [token for token in range(remote.rows) if token not in usable and token not in remote.control]
        found += [(_shown(remote.tokens[token]), "never written by its own tokenizer") for token in never]
    return found


def _shown(data: bytes) -> str:
    """A token's text with what nobody sees as escapes, or its bytes."""
    try:
        return repr(data.decode())[1:-1]
    except UnicodeDecodeError:
        return repr(data)[2:-1]
