"""Small models whose layers hold a running state (linear attention, state spaces, convolutions), which cannot be taken back.

Where texts branch it is copied. Of a text it is kept after its first part, after the last part that was read, and before that; what
lies between the place that is asked about and the nearest of these is read again.
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uld_offset_models.adapter_batch import Parts
from uld_offset_models.track import Track

Path = tuple[int, ...]
_AS_NEAR = 10  # times what rounding does


def holds_state(config: Any) -> bool:
    """Whether a model of this configuration has layers that hold a running state, beside or instead of keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


class Running:
    """Reads texts with a backbone that holds a running state, and the `parts` of its adapters; `width` is that of its hidden states."""

    def __init__(self, backbone: Any, parts: Parts | None = None) -> None:
        self.backbone, self.parts = backbone, parts
        self._device = next(backbone.parameters()).device
        named = inspect.signature(backbone.forward).parameters
        self._keyword = "cache_params" if "cache_params" in named else "past_key_values"

    def go_on(
        self, track: Track, new: Sequence[int], paths: Sequence[tuple[int, Path]] = ()
    ) -> tuple[Float[Tensor, "tokens width"], dict[tuple[int, Path], Float[Tensor, " width"]]]:
        """Go on with new tokens, which stay, and read each path below the text's first `at` tokens; final hidden states of both."""
        old, text = len(track.tokens), [*track.tokens, *new]
        places = {at for at, _ in paths}
        known = dict(track.running)
        hidden: dict[int, Tensor] = {}  # by where the part that was read ends
        for stop in sorted({*places, old, len(text)}):
            if stop == 0 or stop in known:
                continue
            start = max((at for at in known if at < stop), default=0)
            known[stop], (hidden[stop],) = self._read(track, known.get(start), [text[start:stop]])
        track.tokens = text
        track.running = {at: known[at] for at in {min(known, default=0), old, len(text)} if at in known}
        chain = [states for stop, states in sorted(hidden.items()) if stop > old]
        return torch.cat(chain) if chain else torch.empty(0), self._branches(track, known, paths)

    def _branches(self, track: Track, known: dict[int, Any], paths: Sequence[tuple[int, Path]]) -> dict[tuple[int, Path], Tensor]:
        """Hidden states of paths, those that begin at one place and are of one length in one batch."""
        alike: dict[tuple[int, int], list[Path]] = defaultdict(list)
        for at, path in paths:
            alike[at, len(path)].append(path)
        found: dict[tuple[int, Path], Tensor] = {}
        for (at, size), some in alike.items():
            _, states = self._read(track, known.get(at), [list(path) for path in some])
            found |= {(at, path[: end + 1]): row[end] for path, row in zip(some, states, strict=True) for end in range(size)}
        return found

    def _read(self, track: Track, before: Any, texts: Sequence[Sequence[int]]) -> tuple[Any, Float[Tensor, "texts tokens width"]]:
        """Read texts of one length after a state, which stays as it is: the state after them, and their hidden states."""
        cache = deepcopy(before)
        if before is not None and len(texts) > 1:
            cache.reorder_cache(torch.zeros(len(texts), dtype=torch.long, device=self._device))
        return self._pass(cache, torch.tensor(texts), track.adapter, at_once=before is None or self._at_once)

    @torch.inference_mode()
    def _pass(
        self, cache: Any, ids: Int[Tensor, "texts tokens"], adapter: int = 0, *, at_once: bool
    ) -> tuple[Any, Float[Tensor, "texts tokens width"]]:
        if self.parts is not None:
            self.parts.counts = [len(ids) if number == adapter else 0 for number in range(self.parts.adapters)]
        states = []
        for part in (ids,) if at_once else torch.split(ids, 1, 1):
            given = {} if cache is None else {self._keyword: cache}
            out = self.backbone(input_ids=part.to(self._device), use_cache=True, **given)
            cache = out[self._keyword]
            states.append(out.last_hidden_state)
        return cache, torch.cat(states, 1)

    @cached_property
    def _at_once(self) -> bool:
        """Whether the model goes on with several tokens as with one after another, tried on a few: some start anew with each pass."""
        ids, half = torch.arange(6)[None], 3
        whole = self._pass(None, ids, at_once=True)[1][:, half:]
        off = []
        for at_once in (True, False):
            cache, _ = self._pass(None, ids[:, :half], at_once=True)
            off.append(float((self._pass(cache, ids[:, half:], at_once=at_once)[1] - whole).abs().max()))
        return off[0] <= _AS_NEAR * max(off[1], float(whole.abs().max()) * torch.finfo(whole.dtype).eps)
