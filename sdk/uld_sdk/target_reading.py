"""What the target says of a pair's training texts: out of the cache of a server's answers, or of a model that is run here once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from uld_offset_models.data import Example
    from uld_offset_models.encoding import Encoded
    from uld_offset_models.recipes import Recipe
    from uld_offset_models.target_cache import TargetCache
    from uld_offset_models.target_side import TargetSide
    from uld_sdk.preparation import Prepared


@dataclass(frozen=True)
class TargetSource:
    """Where the target's log-probabilities come from; `sha256` tells one source from another."""

    cache: "TargetCache | None"
    model: str | None
    sha256: str

    @classmethod
    def of(cls, recipe: "Recipe") -> "TargetSource":
        """The recipe's; raises `UsageError` unless it names one, and one only. Where nothing is trained there is none."""
        from uld_offset_models.assistant import base_fingerprint
        from uld_offset_models.target_cache import TargetCache

        if not recipe.trains:
            return cls(None, None, "")
        if (recipe.cache is None) == (recipe.target is None):
            what = "nothing says" if recipe.cache is None else "--cache and --target both say"
            raise UsageError(
                f"{what} what the target thinks of the texts",
                hint="give either --cache CACHE, which `uld-sdk cache` makes, or --target MODEL, which runs here",
            )
        if recipe.cache is None:
            return cls(None, recipe.target, base_fingerprint(recipe.target or ""))
        cache = TargetCache.open(recipe.cache)
        return cls(cache, None, cache.manifest.sha256)

    def foreign(self, recipe: "Recipe", tokenizer: Any) -> bool:
        """Whether it is a cache in other tokens than the base's; raises `UsageError` where nothing tells what these are, or is needless."""
        from uld_adapters.vocabulary.tokens import tokenizer_fingerprint

        same = self.cache is None or self.cache.manifest.tokenizer_sha256 == tokenizer_fingerprint(tokenizer)
        if same and recipe.target_tokenizer is not None:
            raise UsageError(
                "--target-tokenizer is for a cache in other tokens than the base's", hint="leave it out: this target has the base's tokens"
            )
        return not same and recipe.target_tokenizer is not None

    @property
    def name(self) -> str:
        """The target's name: that of the server's model, or the place of the local one."""
        if self.cache is not None:
            return self.cache.target
        if self.model is None:
            return "none"
        where = Path(self.model).expanduser()
        return str(where.resolve()) if where.exists() else self.model

    @property
    def top_logprobs(self) -> int | None:
        """How many log-probabilities a position has, None for all."""
        return None if self.cache is None else self.cache.top_logprobs

    def side(self, prepared: "Prepared", rows: "Mapping[Encoded, Example]") -> "TargetSide":
        """What it says of these rows; raises `UsageError` for a cache of another tokenizer, template or data."""
        from uld_offset_models.target_side import CachedTarget

        if self.cache is None:
            return _local(self.model or "", prepared, rows)
        from uld_adapters.vocabulary.tokens import rows_of, tokenizer_fingerprint
        from uld_offset_models.store import check_identity
        from uld_offset_models.target_cache import template_hash

        tokenizer = prepared.tokenizer
        wanted = {
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            "template_sha256": template_hash(tokenizer, chat_template=prepared.chat),
        }
        check_identity(
            self.cache.path,
            self.cache.manifest,
            wanted,
            hint="name that tokenizer: --target-tokenizer, or make the cache with this base: `uld-sdk cache --base BASE`",
        )
        self.cache.check({row: example.place for row, example in rows.items()})
        return CachedTarget(self.cache.find, tail=prepared.recipe.tail, vocabulary=rows_of(tokenizer))


def _local(model: str, prepared: "Prepared", rows: "Mapping[Encoded, Example]") -> "TargetSide":
    """Run the target over the rows, each with the prompt that its own template makes, and keep its hidden states."""
    from uld_offset_models.assistant import load_base
    from uld_offset_models.encoding import Encoded
    from uld_offset_models.target_side import LocalTarget
    from uld_offset_models.tuned import Tuned
    from uld_sdk.caching.texts import encode_texts

    if not rows:
        return LocalTarget({}, prepared.base.get_output_embeddings().weight)
    device = str(prepared.base.get_output_embeddings().weight.device)
    loaded, tokenizer = load_base(model, dtype=prepared.dtype, device=device)
    texts = encode_texts(
        list(rows.values()), tokenizer, prepared.tokenizer, chat_template=prepared.recipe.chat_template, longest=prepared.longest
    )
    theirs = {text.row: Encoded((*text.prompt, *text.row.answer), len(text.prompt)) for text in texts}
    target = Tuned(loaded, tokenizer, trainable="full", autocast=False)
    states = target.states(list(dict.fromkeys(theirs.values())))
    return LocalTarget({row: states[asked] for row, asked in theirs.items()}, target.head.detach().clone())


def frozen_states(source: TargetSource, prepared: "Prepared", rows: "Sequence[Encoded]", compute: Any) -> "Mapping[Encoded, Tensor]":
    """The frozen model's hidden states (tokens, width) of the rows: kept beside a cache for the next training, else computed anew."""
    import torch

    rows = list(dict.fromkeys(rows))
    if source.cache is None:
        found: Mapping[Encoded, Tensor] = compute(rows)
        return found
    from uld_offset_models.state_cache import kept_states

    layers, sha256 = prepared.base.config.num_hidden_layers, prepared.identity["base"]
    dtype = torch.float32 if prepared.recipe.trainable == "full" else prepared.dtype
    folder = source.cache.path / f"states-{sha256[:16]}-{layers}-{str(dtype).removeprefix('torch.')}"
    width = prepared.base.config.hidden_size
    return kept_states(folder, rows, compute, weights_sha256=f"{sha256}/{layers}", dtype=dtype, width=width)
