"""What a target of another tokenizer says of a pair's training texts: its cache, and a bridge from its tokens to the small model's."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from uld_adapters.errors import TokenizerMismatch
from uld_sdk.target_reading import TargetSource

if TYPE_CHECKING:
    from uld_offset_models.data import Example
    from uld_offset_models.encoding import Encoded
    from uld_offset_models.target_side import TargetSide
    from uld_offset_models.tuned import Tuned
    from uld_sdk.preparation import Prepared


def bridged_side(source: TargetSource, prepared: "Prepared", rows: "Mapping[Encoded, Example]", frozen: "Tuned") -> "TargetSide":
    """The target's side of the rows, which the cache has in the target's tokens, with what the frozen model makes of these.

    That is kept beside the cache for the next training.

    Raises `UsageError` for a cache of another tokenizer, template or data, and `TokenizerMismatch` where no bridge leads from one to
    the other.
    """
    from uld_adapters.vocabulary.bridge import Bridge
    from uld_adapters.vocabulary.opening import open_tokenizer
    from uld_adapters.vocabulary.tokens import Vocabulary, tokenizer_fingerprint
    from uld_adapters.vocabulary.verdicts import kind_of
    from uld_offset_models.bridged_cache import kept_rows
    from uld_offset_models.bridged_target import FORMAT, BridgedTarget, check_attention, read_row
    from uld_offset_models.encoding import encode, uses_chat_template
    from uld_offset_models.store import check_identity
    from uld_offset_models.target_cache import template_hash

    cache, recipe = source.cache, prepared.recipe
    if cache is None:
        raise ValueError("only a cache can be in other tokens")
    tokenizer = open_tokenizer(recipe.target_tokenizer)
    chat = uses_chat_template(tokenizer, wanted=recipe.chat_template)
    said = {"tokenizer_sha256": tokenizer_fingerprint(tokenizer), "template_sha256": template_hash(tokenizer, chat_template=chat)}
    check_identity(cache.path, cache.manifest, said, hint="give the tokenizer that the cache was made with, without --base")
    remote, small = Vocabulary.from_hf(tokenizer), Vocabulary.from_hf(prepared.tokenizer)
    if kind_of(remote, small) == "path":
        raise TokenizerMismatch(
            f"it is not known how {remote.name or recipe.target_tokenizer} splits text", hint="give a tokenizer file that says it"
        )
    theirs = dict(zip(rows, encode(tokenizer, list(rows.values()), chat_template=chat, max_length=recipe.max_length), strict=True))
    cache.check({theirs[row]: example.place for row, example in rows.items()})
    texts = {row: (asked.answer, cache.find(asked.prompt, asked.answer)) for row, asked in theirs.items()}
    check_attention(frozen)
    bridge = Bridge(remote, small)
    of = (
        *(FORMAT, cache.manifest.sha256, remote.fingerprint, small.fingerprint, recipe.tail),
        *(prepared.identity["base"], prepared.base.config.num_hidden_layers, prepared.dtype),
    )
    sha256 = hashlib.sha256("/".join(map(str, of)).encode()).hexdigest()
    found = kept_rows(
        cache.path / f"bridged-{sha256[:16]}",
        list(rows),
        lambda row: read_row(frozen, bridge, row, *texts[row], tail=recipe.tail),
        of_sha256=sha256,
    )
    return BridgedTarget(found)
