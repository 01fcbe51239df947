"""How the assistant's tokens are told in the large model's, chosen once when a client starts."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from uld_adapters.vocabulary.alignment import Alignment, Identity, gather
from uld_adapters.vocabulary.tokens import Vocabulary, load_tokenizer, tokenizer_fingerprint
from uld_sdk.bridge_reading import Bridging

Wanted = Literal["auto", "bridge", "bridge-exact", "path"]
_log = logging.getLogger("uld_sdk")


class ApproximateWarning(UserWarning):
    """The assistant's values of the large model's tokens are approximate, and no bound of the error is known."""


@dataclass(frozen=True)
class Aligned:
    """The alignment and its mode: identity, permutation, bridge, bridge-exact or path."""

    mode: str
    alignment: Alignment | Bridging


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a backend's tokenizer: its own where it has one, else that of a transformers tokenizer."""
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    known = getattr(tokenizer, "vocabulary", None)
    return known if isinstance(known, Vocabulary) else Vocabulary.from_hf(tokenizer)


def align(tokenizer: Any, small: Any, *, fingerprint: str, wanted: Wanted = "auto") -> Aligned:
    """Choose by bytes and by how both split text, and say once which mode runs (logger "uld_sdk", level INFO).

    `small` holds the assistant's tokenizer, of this fingerprint. Raises TokenizerMismatch where the two cannot be brought
    together.
    """
    remote = tokenizer if isinstance(tokenizer, Vocabulary) else getattr(tokenizer, "vocabulary", None)
    print_ = remote.fingerprint if isinstance(remote, Vocabulary) else tokenizer_fingerprint(tokenizer)
    if wanted == "auto" and print_ == fingerprint:
        return _said(Aligned("identity", Identity()))
    from uld_adapters.vocabulary.classify import require_bytes
    from uld_adapters.vocabulary.verdicts import kind_of

    theirs, ours = vocabulary_of(tokenizer), Vocabulary.from_hf(load_tokenizer(small))
    kind = kind_of(theirs, ours)
    if kind in ("identity", "permutation") and wanted == "auto":
        return _said(Aligned(kind, gather(theirs, ours)))
    require_bytes(theirs, ours)
    mode = "path" if kind == "path" else "bridge" if wanted == "auto" else wanted
    closed = f"it is not known how {theirs.name or 'the large model'} splits text: pass tokenizer=..."
    return _said(bridged(mode, theirs, ours), why=closed if theirs.closed else "alignment='path' reads one spelling a token")


def bridged(mode: str, remote: Vocabulary, small: Vocabulary) -> Aligned:
    """The modes that read trees."""
    from uld_adapters.vocabulary.bridge import Bridge
    from uld_adapters.vocabulary.single_path import SinglePath

    weighing = SinglePath(remote, small) if mode == "path" else Bridge(remote, small)
    return Aligned(mode, Bridging(weighing, remote.rows, exact=mode == "bridge-exact"))


def _said(aligned: Aligned, why: str = "") -> Aligned:
    _log.info("the assistant reads the large model's tokens by %s", aligned.mode)
    if aligned.mode == "path":
        warnings.warn(
            f"the assistant's values of the large model's tokens are approximate, and nothing bounds the error: {why}",
            ApproximateWarning,
            stacklevel=2,
        )
    return aligned
