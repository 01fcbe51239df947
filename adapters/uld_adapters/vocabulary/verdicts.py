"""Verdicts on pairs of vocabularies, kept from run to run: comparing two large ones takes seconds."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from uld_adapters.vocabulary.classify import Kind, classify
from uld_adapters.vocabulary.tokens import Vocabulary

_KINDS: tuple[Kind, ...] = ("identity", "permutation", "bridge", "path")
_FORMAT = 3  # goes up when the comparison changes


def kind_of(remote: Vocabulary, small: Vocabulary) -> Kind:
    """How two vocabularies belong together, looked up where this pair was seen before.

    Verdicts lie in $ULD_CACHE, else in the user's cache folder; one that cannot be read or written is no error.
    """
    path = _file()
    key = f"{_FORMAT}:{_key(remote)}:{_key(small)}"
    kept: dict[str, str] = {}
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        kept = value if isinstance(value, dict) else {}
    found = next((kind for kind in _KINDS if kind == kept.get(key)), None)
    if found is None:
        found = classify(remote, small).kind
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_text(json.dumps({**kept, key: found}, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
    return found


def _key(vocabulary: Vocabulary) -> str:
    """What a comparison looks at: the fingerprint, and what two vocabularies of one fingerprint may differ in."""
    more = [sorted(vocabulary.roles.items()), vocabulary.normalisers, vocabulary.closed]
    return hashlib.sha256(json.dumps([vocabulary.fingerprint, more]).encode()).hexdigest()


def _file() -> Path:
    folder = os.environ.get("ULD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "uld-sdk"
    return Path(folder).expanduser() / "alignments.json"
