"""A small model reads a tree of tokens below a text: one pass in which each token sees the text and its own ancestors only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from uld_offset_models.adapter_batch import Parts
from uld_offset_models.running import Running, holds_state
from uld_offset_models.track import Track

Path = tuple[int, ...]


@dataclass
class Growth:
    """What is to be read of one text: `chain` goes on with it, each of `paths` stands below its first `at` tokens, (at, tokens)."""

    track: Track
    chain: Sequence[int] = ()
    paths: Sequence[tuple[int, Path]] = ()


@dataclass
class Grown:
    """The tokens of one growth as a tree: the chain first, then the branches, each with its parent (-1: the text alone)."""

    growth: Growth
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # how many of the text's tokens are seen
    nodes: dict[tuple[int, Path], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start = len(self.growth.track.tokens)
        for number, token in enumerate(self.growth.chain):
            self._add(token, number - 1, start)
        for at, path in self.growth.paths:
            self._grow(at, path, start)

    def _add(self, token: int, parent: int, seen: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.seen.append(seen)
        return len(self.tokens) - 1

    def _grow(self, at: int, path: Path, start: int) -> None:
        chain = list(self.growth.chain)
        for size in range(1, len(path) + 1):
            if (at, path[:size]) in self.nodes:
                continue
            on_chain = at >= start and chain[at - start : at - start + size] == list(path[:size])
            if on_chain:
                self.nodes[at, path[:size]] = at - start + size - 1
                continue
            parent = self.nodes[at, path[: size - 1]] if size > 1 else at - start - 1 if at > start else -1
            self.nodes[at, path[:size]] = self._add(path[size - 1], parent, min(at, start))

    def ancestors(self) -> Tensor:
        """Which tokens each of the tree's tokens sees, itself included."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for number, parent in enumerate(self.parents):
            if parent >= 0:
                seen[number] |= seen[parent]
        return seen

    def depths(self) -> list[int]:
        """How many tokens of the tree stand before each."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return found


class Tree:
    """Runs a backbone, with the `parts` of its adapters, over trees of tokens; `width` is that of its final hidden states.

    Where the model's attention cannot take a mask of our own (sliding windows), the paths go through it as a batch of texts with copied
    caches; of one that holds a running state (linear attention) the state is copied.
    """

    def __init__(self, backbone: Any, *, parts: Parts | None = None, masks: bool | None = None) -> None:
        self.backbone, self.parts = backbone, parts
        self.masks = takes_masks(backbone.config) if masks is None else masks
        self._running = Running(backbone, parts) if holds_state(backbone.config) else None
        self.passes = 0

    @torch.inference_mode()
    def grow(self, growths: Sequence[Growth]) -> list[dict[tuple[int, Path], Float[Tensor, " width"]]]:
        """Read all growths in one pass; final hidden states after each token of the chains, as (length, ()), and of each path.

        The chain's tokens stay in the track; the branches leave nothing behind.
        """
        grown = [Grown(growth) for growth in growths]
        if not any(one.tokens for one in grown):
            return [{} for _ in grown]
        self.passes += 1
        if self._running is not None:
            return [_gone_on(self._running, one.growth) for one in grown]
        if not self.masks:
            return self._unfolded(grown)
        order = self._sorted([one.growth.track for one in grown])
        found = dict(zip(order, self._masked([grown[at] for at in order]), strict=True))
        return [found[at] for at in range(len(grown))]

    def _sorted(self, tracks: Sequence[Track]) -> list[int]:
        """The order in which texts of one adapter stand side by side, of which the adapters are told."""
        order = sorted(range(len(tracks)), key=lambda at: tracks[at].adapter)
        if self.parts is not None:
            owners = [track.adapter for track in tracks]
            self.parts.counts = [owners.count(adapter) for adapter in range(self.parts.adapters)]
        return order

    def _masked(self, grown: list[Grown]) -> list[dict[tuple[int, Path], Tensor]]:
        parameter = next(self.backbone.parameters())
        past = max(one.growth.track.past for one in grown)
        width = max(len(one.tokens) for one in grown)
        ids = torch.zeros((len(grown), width), dtype=torch.long)
        where = torch.zeros((len(grown), width), dtype=torch.long)
        seen = torch.zeros((len(grown), 1, width, past + width), dtype=torch.bool)
        for row, one in enumerate(grown):
            count, virtual = len(one.tokens), one.growth.track.virtual
            ids[row, :count] = torch.tensor(one.tokens, dtype=torch.long)
            lengths = torch.tensor(one.seen, dtype=torch.long) + virtual
            where[row, :count] = lengths + torch.tensor(one.depths(), dtype=torch.long)
            seen[row, 0, :count, :past] = torch.arange(past)[None] < lengths[:, None]
            seen[row, 0, :count, past : past + count] = one.ancestors()
            seen[row, 0, count:, past] = True  # padding sees something, so that no row of the softmax is empty
        mask = torch.zeros(seen.shape, dtype=parameter.dtype).masked_fill(~seen, torch.finfo(parameter.dtype).min)
        cache = _stacked([one.growth.track for one in grown], past)
        out = self.backbone(
            input_ids=ids.to(parameter.device),
            attention_mask=mask.to(parameter.device),
            position_ids=where.to(parameter.device),
            past_key_values=cache,
            use_cache=True,
        )
        for row, one in enumerate(grown):
            _keep(one.growth, cache, row, past)
        return [_states(one, states) for one, states in zip(grown, out.last_hidden_state, strict=True)]

    def _unfolded(self, grown: list[Grown]) -> list[dict[tuple[int, Path], Tensor]]:
        """Chains first, then every path that no longer one contains as a text of its own."""
        found: list[dict[tuple[int, Path], Tensor]] = [{} for _ in grown]
        chains = [(number, one) for number, one in enumerate(grown) if one.growth.chain]
        if chains:
            starts = [len(one.growth.track.tokens) for _, one in chains]
            hidden = self._run([(one.growth.track, list(one.growth.chain)) for _, one in chains], keep=True)
            for (number, one), start, states in zip(chains, starts, hidden, strict=True):
                found[number] = {(start + i + 1, ()): states[i] for i in range(len(one.growth.chain))}
        jobs = [(number, at, path) for number, one in enumerate(grown) for at, path in _longest(one.growth.paths)]
        tracks = [(_cut(grown[number].growth.track, at), list(path)) for number, at, path in jobs]
        for (number, at, path), states in zip(jobs, self._run(tracks, keep=False) if tracks else (), strict=True):
            found[number] |= {(at, path[: size + 1]): states[size] for size in range(len(path))}
        return found

    def _run(self, jobs: Sequence[tuple[Track, list[int]]], *, keep: bool) -> list[Tensor]:
        """Texts go on with new tokens in the model's own attention, those of one shape in one batch."""
        device = next(self.backbone.parameters()).device
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, (track, new) in enumerate(jobs):
            shapes.setdefault((track.past, len(new)), []).append(number)
        found: dict[int, Tensor] = {}
        for (past, width), unsorted in shapes.items():
            numbers = [unsorted[at] for at in self._sorted([jobs[number][0] for number in unsorted])]
            cache = _stacked([jobs[number][0] for number in numbers], past)
            out = self.backbone(
                input_ids=torch.tensor([jobs[number][1] for number in numbers], device=device),
                position_ids=torch.arange(past, past + width, device=device).expand(len(numbers), width),
                past_key_values=cache,
                use_cache=True,
            )
            for row, number in enumerate(numbers):
                found[number] = out.last_hidden_state[row]
                if keep:
                    track, new = jobs[number]
                    track.layers = [(kv.keys[row], kv.values[row]) for kv in cache.layers]
                    track.tokens = [*track.tokens, *new]
        return [found[number] for number in range(len(jobs))]


def _gone_on(running: Running, growth: Growth) -> dict[tuple[int, Path], Tensor]:
    start = len(growth.track.tokens)
    chain, found = running.go_on(growth.track, growth.chain, list(_longest(growth.paths)))
    return found | {(start + number + 1, ()): states for number, states in enumerate(chain)}


def takes_masks(config: Any) -> bool:
    """Whether all layers attend to everything before them, so that a mask can say what a token sees."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return kinds == {"full_attention"}
    return getattr(config, "sliding_window", None) is None and hasattr(config, "num_attention_heads")


def _longest(paths: Sequence[tuple[int, Path]]) -> Iterator[tuple[int, Path]]:
    """The paths that are no beginnings of others."""
    inner = {(at, path[:size]) for at, path in paths for size in range(1, len(path))}
    yield from dict.fromkeys((at, path) for at, path in paths if path and (at, path) not in inner)


def _cut(track: Track, length: int) -> Track:
    copy = replace(track)
    copy.rollback(length)
    return copy


def _stacked(tracks: list[Track], past: int) -> Any:
    """One cache of several texts, padded on the right."""
    from transformers import DynamicCache

    cache = DynamicCache()
    known = next((track.layers for track in tracks if track.past), [])
    for layer, (shape, _) in enumerate(known):
        parts = []
        for part in (0, 1):
            rows = shape.new_zeros((len(tracks), shape.shape[0], past, shape.shape[2]))
            for row, track in enumerate(tracks):
                if track.past:
                    rows[row, :, : track.past] = track.layers[layer][part]
            parts.append(rows)
        cache.update(parts[0], parts[1], layer)
    return cache


def _keep(growth: Growth, cache: Any, row: int, past: int) -> None:
    """The chain's keys and values, the first of the new ones, become part of the track."""
    track, count = growth.track, len(growth.chain)
    if not count:
        return
    old = track.past
    track.layers = [
        tuple(torch.cat([t[row, :, :old], t[row, :, past : past + count]], 1) for t in (kv.keys, kv.values))  # type: ignore[misc]
        for kv in cache.layers
    ]
    track.tokens = [*track.tokens, *growth.chain]


def _states(one: Grown, states: Tensor) -> dict[tuple[int, Path], Tensor]:
    start = len(one.growth.track.tokens) - len(one.growth.chain)
    found = {(start + number + 1, ()): states[number] for number in range(len(one.growth.chain))}
    return found | {node: states[number] for node, number in one.nodes.items()}
