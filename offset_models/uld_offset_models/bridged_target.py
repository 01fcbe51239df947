"""A target of another vocabulary as training sees it: what it says of the rows, and the frozen model's side of it, read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from uld_adapters.errors import UsageError
from uld_adapters.vocabulary.bridge import Bridge, Place
from uld_adapters.vocabulary.terms import Term, write_terms
from uld_offset_models.bridged_rows import BridgedRow, tree_pack
from uld_offset_models.encoding import Encoded
from uld_offset_models.shift import Tail
from uld_offset_models.target_logits import Support, TopRows, truncated
from uld_offset_models.target_record import TargetLogprobs
from uld_offset_models.target_side import FrozenLogits
from uld_offset_models.term_sums import gathered
from uld_offset_models.track import Track
from uld_offset_models.tree import Grown, Growth, Path, takes_masks
from uld_offset_models.tuned import Tuned

MOST = 100  # candidates a position
FORMAT = 3  # goes up when other trees or terms are made of the same texts
_NEVER = -1e4  # a logit that leaves no probability


class BridgedTarget:
    """L_M over the candidates of each position of the target's tokens."""

    def __init__(self, rows: Mapping[Encoded, BridgedRow]) -> None:
        self.rows = rows

    def read(self, rows: Sequence[Encoded]) -> list[BridgedRow]:
        """The rows' trees with what the target says."""
        return [self.rows[row] for row in rows]

    def support(self, known: list[BridgedRow], labels: Int[Tensor, " tokens"], frozen: FrozenLogits) -> Support:
        """The candidates' logits, the answer's own token in the first column."""
        return Support(side_by_side([row.target for row in known], _NEVER).to(labels.device), None, labels)


def side_by_side(parts: Sequence[Float[Tensor, "n candidates"]], fill: float) -> Float[Tensor, "tokens candidates"]:
    """Positions of several answers below each other, filled up to as many candidates."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


@dataclass
class _Text:
    """An answer in the target's tokens on the small side: its chain, and the place before each token with the paths asked for there."""

    chain: list[int]
    places: list[tuple[int, Place]]
    paths: list[set[Path]]

    @classmethod
    def walked(cls, bridge: Bridge, prompt: Sequence[int], answer: Sequence[int]) -> "_Text":
        """After the prompt the answer begins a new text."""
        chain, places, place = list(prompt), [], bridge.start()
        for token in answer:
            places.append((len(chain), place))
            certain, place = bridge.step(place, token)
            chain += certain
        return cls(chain[: places[-1][0]], places, [set(bridge.cover(place)) for _, place in places])

    def asked(self) -> list[tuple[int, Path]]:
        """All nodes, (place, path), each once."""
        return list(dict.fromkeys((at, path) for (at, _), some in zip(self.places, self.paths, strict=True) for path in sorted(some)))

    def grown(self) -> tuple[Grown, Int[Tensor, " nodes"]]:
        """The tree, and where its nodes lie in it; an empty path is the chain's last token before the place."""
        asked = self.asked()
        tree = Grown(Growth(Track(), self.chain, asked))
        return tree, torch.tensor([tree.nodes[at, path] if path else at - 1 for at, path in asked])

    def rows(self, tuned: Tuned) -> list[dict[Path, Float[np.ndarray, "1 rows"]]]:
        """P_o after the paths of each place."""
        hidden = tuned.hidden(tree_pack([self.grown()], [len(self.places)], forget=1))
        found = dict(zip(self.asked(), tuned.logits(hidden).softmax(-1).cpu().numpy(), strict=True))
        return [{path: found[at, path][None] for path in some} for (at, _), some in zip(self.places, self.paths, strict=True)]


def check_attention(tuned: Tuned) -> None:
    """Raise `UsageError` for a base whose attention cannot read trees."""
    if not takes_masks(tuned.inner.config):
        raise UsageError(
            "the base has sliding-window or linear attention, which cannot read a target of another tokenizer in training",
            hint="choose a base with full attention, or one of the target's tokenizer",
        )


@torch.no_grad()
def read_row(tuned: Tuned, bridge: Bridge, row: Encoded, answer: Sequence[int], said: TargetLogprobs, *, tail: Tail) -> BridgedRow:
    """What training needs of a row: its answer in the target's tokens and what the target says there are given, `tuned` is o.

    Under the policy `complete` all tokens outside of K are one more candidate, whose probability moves as the sum of theirs does.
    """
    top, labels = TopRows.joined([_first(said)]), torch.tensor(answer)
    found = truncated(top, labels)
    target, ids = found.logits, cast(Tensor, found.ids)
    real = target > _NEVER / 2
    text = _Text.walked(bridge, row.prompt, answer)
    candidates = [some[fits].tolist() for some, fits in zip(ids, real, strict=True)]
    for (_, place), some, rows, asked in zip(text.places, text.paths, text.rows(tuned), candidates, strict=True):
        some |= bridge.nodes(place, asked, rows)
    tree, nodes = text.grown()
    numbers = {node: number for number, node in enumerate(text.asked())}
    width, known = target.shape[1], torch.zeros(target.shape, dtype=torch.bool)
    terms: list[tuple[int, int, Term]] = []
    standing: list[tuple[int, int, float]] = []
    for position, ((at, place), rows) in enumerate(zip(text.places, text.rows(tuned), strict=True)):
        first = position * (width + 1)
        written = write_terms(bridge, place, candidates[position], rows)
        for column, mine in zip(real[position].nonzero().flatten().tolist(), written.candidates, strict=True):
            if mine is not None and sum(float(term.mass(rows)[0]) for term in mine) > 0:
                known[position, column] = True
                terms += [(first + column, at, term) for term in mine]
        terms += [(first + width, at, term) for term in written.boundary]
        standing += [(position, numbers[at, path], weight) for path, weight in written.standing]
    if tail == "complete":
        told = (top.ids == labels[:, None]).any(1)
        mass = (top.tail - torch.where(told, 0.0, target[:, 0].exp())).clamp(min=1e-30)
        target, known = torch.cat([target, mass.log()[:, None]], 1), torch.nn.functional.pad(known, (0, 1), value=True)
    made = BridgedRow(
        tree=tree,
        nodes=nodes,
        sums=gathered(terms, numbers, slots=len(answer) * (width + 1)),
        target=target,
        known=known,
        completed=tail == "complete",
        standing=torch.tensor([(position, node) for position, node, _ in standing]),
        weights=torch.tensor([weight for _, _, weight in standing]),
    )
    hidden = tuned.hidden(tree_pack([(tree, nodes)], [len(answer)], forget=1))
    return replace(made, frozen=made.scores(hidden, tuned.head).float().cpu())


def _first(said: TargetLogprobs) -> TargetLogprobs:
    """The most probable tokens of each position, where the target said more than training looks at."""
    if said.ids.shape[1] <= MOST:
        return said
    order = np.argsort(-said.logprobs, axis=1, kind="stable")[:, :MOST]
    ids, logprobs = (np.take_along_axis(values, order, 1) for values in (said.ids, said.logprobs))
    tail = np.maximum(0.0, 1.0 - np.exp(logprobs.astype(np.float64)).sum(1)).astype(np.float32)
    return TargetLogprobs(ids, logprobs, said.label, tail)
