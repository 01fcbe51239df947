"""Training rows whose target speaks other tokens: the small models' tree below an answer, and what is asked of it at each position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uld_offset_models.packing import Layout, Pack
from uld_offset_models.term_sums import Sums
from uld_offset_models.tree import Grown


@dataclass(frozen=True)
class BridgedRow:
    """An answer of n of the target's tokens, and what is asked of the small models about it.

    `target` is l_M of the candidates at each position, the row's own token first, with the tail as the last one if it is `completed`;
    `known` says of which of them the small models' tokens can tell. The sums of a position are those of its candidates, and last
    that of the boundary. `frozen` is log s_o of the same. `standing` are the nodes (position, node) at which the small models may
    stand, with their `weights`.
    """

    tree: Grown
    nodes: Int[Tensor, " nodes"]
    sums: Sums
    target: Float[Tensor, "n candidates"]
    known: Bool[Tensor, "n candidates"]
    completed: bool
    standing: Int[Tensor, "places 2"]
    weights: Float[Tensor, " places"]
    frozen: Float[Tensor, "n candidates"] = field(default_factory=lambda: torch.empty(0, 0))

    def scores(self, hidden: Float[Tensor, "nodes width"], head: Float[Tensor, "rows width"]) -> Float[Tensor, "n candidates"]:
        """Log s of the candidates, at most 0 as the bridge itself reads it, and 0 where nothing is known; the tail's is what they leave."""
        width = self.known.shape[1] - self.completed
        known = self.known[:, :width].to(hidden.device)
        sums = self.sums.of(hidden, head).reshape(-1, width + 1)
        parts = sums[:, :width].clamp(min=1e-300)
        shares = torch.where(known, parts / torch.maximum(parts, sums[:, width:]), torch.ones_like(parts))
        found = shares.log()
        if not self.completed:
            return found
        rest = (1 - torch.where(known, shares, torch.zeros_like(shares)).sum(1, keepdim=True)).clamp(min=1e-9)
        return torch.cat([found, rest.log()], 1)

    def gate(self, gates: Float[Tensor, " nodes"]) -> Float[Tensor, "n 1"]:
        """The gate at each position: that of the places at which the small models may stand, by the frozen one's weight."""
        at, weights = self.standing.to(gates.device), self.weights.to(gates)
        count = len(self.target)
        whole = gates.new_zeros(count).index_add(0, at[:, 0], weights).clamp(min=1e-12)
        return (gates.new_zeros(count).index_add(0, at[:, 0], weights * gates[at[:, 1]]) / whole).unsqueeze(-1)


def tree_pack(trees: Sequence[tuple[Grown, Int[Tensor, " nodes"]]], counts: Sequence[int], *, forget: int) -> Pack:
    """Trees end to end, one a row of so many (`counts`) answer positions, the first `forget` of them forget rows; `at` are all nodes."""
    starts = [0, *accumulate(len(tree.tokens) for tree, _ in trees)]
    mine = (sum(counts[:forget]), sum(counts[forget:]))
    return Pack(
        input_ids=torch.tensor([[token for tree, _ in trees for token in tree.tokens]]),
        position_ids=torch.tensor([[depth for tree, _ in trees for depth in tree.depths()]]),
        at=torch.cat([nodes + start for (_, nodes), start in zip(trees, starts, strict=False)]),
        labels=torch.zeros(sum(counts), dtype=torch.long),
        forget=mine[0],
        layout=Layout(0, tuple(len(tree.tokens) for tree, _ in trees), tuple(tree.ancestors() for tree, _ in trees)),
        rows=tuple(counts),
        totals=mine,
    )
