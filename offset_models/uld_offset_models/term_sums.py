"""The terms of a bridge (`uld_adapters.vocabulary.terms`) summed for a model in training, with gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from uld_adapters.vocabulary.terms import Term
from uld_offset_models.tree import Path

_CHUNK = 96  # nodes whose logits are in memory at a time


@dataclass(frozen=True)
class Sums:
    """Sums of terms over a tree, in flat arrays: `slots` of them, most of which are not asked for by any term and stay 0.

    An edge is P(token | node), a group P(one of its tokens | node); a path is a product of edges, and a term
    sign * path * group, or sign * path where its group is -1, which is added to its slot.
    """

    edges: Int[Tensor, "edges 2"]
    group_nodes: Int[Tensor, " members"]
    group_ids: Int[Tensor, " members"]
    group_of: Int[Tensor, " members"]
    groups: int
    path_of: Int[Tensor, " steps"]
    path_edges: Int[Tensor, " steps"]
    paths: int
    signs: Float[Tensor, " terms"]
    term_paths: Int[Tensor, " terms"]
    term_groups: Int[Tensor, " terms"]
    term_slots: Int[Tensor, " terms"]
    slots: int

    def of(self, hidden: Float[Tensor, "nodes width"], head: Float[Tensor, "rows width"]) -> Float[Tensor, " slots"]:
        """The sums for a model's final hidden states at the nodes; logits are of a few nodes at a time, and made again for gradients."""

        def on(values: Tensor) -> Tensor:
            return values.to(hidden.device)

        edges = hidden.new_zeros(len(self.edges), dtype=torch.float64)
        groups = hidden.new_zeros(self.groups, dtype=torch.float64)
        for at in range(0, len(hidden), _CHUNK):
            some = slice(at, at + _CHUNK)
            here = [((nodes >= at) & (nodes < at + _CHUNK)).nonzero().flatten() for nodes in (self.edges[:, 0], self.group_nodes)]
            pairs = self.edges[here[0]] - torch.tensor([at, 0])
            members = torch.stack([self.group_nodes[here[1]] - at, self.group_ids[here[1]]], 1)
            asked = (hidden[some], head, on(pairs), on(members))
            chosen, masses = checkpoint(_logprobs, *asked, use_reentrant=False) if torch.is_grad_enabled() else _logprobs(*asked)
            edges = edges.index_put((on(here[0]),), chosen)
            groups = groups.index_add(0, on(self.group_of[here[1]]), masses)
        paths = edges.new_zeros(self.paths).index_add(0, on(self.path_of), edges[on(self.path_edges)])
        whole = torch.cat([groups, groups.new_ones(1)])  # the last is for terms without a group
        masses = on(self.signs) * paths.exp()[on(self.term_paths)] * whole[on(self.term_groups)]
        return masses.new_zeros(self.slots).index_add(0, on(self.term_slots), masses)


def _logprobs(
    hidden: Float[Tensor, "nodes width"], head: Float[Tensor, "rows width"], pairs: Int[Tensor, "n 2"], members: Int[Tensor, "m 2"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Log-probabilities of (node, token) pairs, and probabilities of further ones."""
    logits = torch.nn.functional.linear(hidden.to(head.dtype), head).double()
    normaliser = logits.logsumexp(-1)
    chosen, others = (logits[some[:, 0], some[:, 1]] - normaliser[some[:, 0]] for some in (pairs, members))
    return chosen, others.exp()


def gathered(terms: Sequence[tuple[int, int, Term]], nodes: dict[tuple[int, Path], int], *, slots: int) -> Sums:
    """Lay terms (slot, place in the text, term) out over numbered nodes (place, path)."""
    edges: dict[tuple[int, int], int] = {}
    paths: dict[tuple[int, Path], int] = {}
    path_of, path_edges, group_nodes, group_ids, group_of = [], [], [], [], []
    flat = []
    groups = 0
    for slot, at, term in terms:
        if (at, term.path) not in paths:
            paths[at, term.path] = len(paths)
            for size, token in enumerate(term.path):
                path_of.append(paths[at, term.path])
                path_edges.append(edges.setdefault((nodes[at, term.path[:size]], token), len(edges)))
        group = -1
        if term.ids is not None:
            group, groups = groups, groups + 1
            group_nodes.append(np.full(term.ids.size, nodes[at, term.path]))
            group_ids.append(term.ids)
            group_of.append(np.full(term.ids.size, group))
        flat.append((term.sign, paths[at, term.path], group, slot))
    signs, term_paths, term_groups, term_slots = torch.tensor(flat, dtype=torch.long).reshape(-1, 4).T
    nothing = np.empty(0, dtype=np.int64)
    return Sums(
        edges=torch.tensor(list(edges), dtype=torch.long).reshape(-1, 2),
        group_nodes=torch.from_numpy(np.concatenate([nothing, *group_nodes])),
        group_ids=torch.from_numpy(np.concatenate([nothing, *group_ids])),
        group_of=torch.from_numpy(np.concatenate([nothing, *group_of])),
        groups=groups,
        path_of=torch.tensor(path_of, dtype=torch.long),
        path_edges=torch.tensor(path_edges, dtype=torch.long),
        paths=len(paths),
        signs=signs.double(),
        term_paths=term_paths,
        term_groups=term_groups,
        term_slots=term_slots,
        slots=slots,
    )
