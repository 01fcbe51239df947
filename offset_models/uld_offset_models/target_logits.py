"""What the target says at the answer positions of training texts, as logits that an ensemble can be made of.

A server tells log p_M of the top k and mostly of the label, and the mass m of the rest. The tail policies of inference hold in
training, too, but that the label counts as known besides K: `truncate` leaves only K and the label, `complete` spreads the rest as the
frozen small model does. Complete distributions need neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_NEVER = -1e4  # a logit that leaves no probability in float32, and with which 0 * log 0 is 0


class Known(Protocol):
    """What is known of one answer: K and its log p_M, the label's own (NaN: outside K and not told), and the mass outside K."""

    @property
    def ids(self) -> Int[np.ndarray, "n k"]: ...  # noqa: D102

    @property
    def logprobs(self) -> Float[np.ndarray, "n k"]: ...  # noqa: D102

    @property
    def label(self) -> Float[np.ndarray, " n"]: ...  # noqa: D102

    @property
    def tail(self) -> Float[np.ndarray, " n"]: ...  # noqa: D102


@dataclass(frozen=True)
class TopRows:
    """What is known of several answers laid end to end, log-probabilities in nats; where K is smaller its ids are negative."""

    ids: Int[Tensor, "tokens k"]
    logprobs: Float[Tensor, "tokens k"]
    label: Float[Tensor, " tokens"]
    tail: Float[Tensor, " tokens"]

    @classmethod
    def joined(cls, answers: Sequence[Known]) -> Self:
        """The answers end to end."""
        width = max(answer.ids.shape[1] for answer in answers)
        pads = [((0, 0), (0, width - answer.ids.shape[1])) for answer in answers]
        ids = np.concatenate([np.pad(a.ids, pad, constant_values=-1) for a, pad in zip(answers, pads, strict=True)])
        logprobs = np.concatenate([np.pad(a.logprobs, pad) for a, pad in zip(answers, pads, strict=True)])
        label, tail = (np.concatenate([getattr(a, name) for a in answers]) for name in ("label", "tail"))
        return cls(torch.from_numpy(ids).long(), *(torch.from_numpy(values).float() for values in (logprobs, label, tail)))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(*(values.to(device) for values in (self.ids, self.logprobs, self.label, self.tail)))


class Support(NamedTuple):
    """l_M on the tokens that the ensemble may give, up to a constant a position; `ids` None says that these are the vocabulary.

    `labels` are the columns of the answer's tokens.
    """

    logits: Float[Tensor, "tokens support"]
    ids: Int[Tensor, "tokens support"] | None
    labels: Int[Tensor, " tokens"]


def truncated(known: TopRows, labels: Int[Tensor, " tokens"]) -> Support:
    """K and the label: l_M = log p_M there, and nothing else can be. A label that was not told has as much as it may have at most."""
    missing, doubled = known.ids < 0, known.ids == labels.unsqueeze(-1)
    least = known.logprobs.masked_fill(missing, torch.inf).amin(-1)
    label = torch.where(known.label.isnan(), torch.minimum(least, known.tail.clamp(min=1e-30).log()), known.label)
    logits = torch.cat([label.unsqueeze(-1), known.logprobs.masked_fill(missing | doubled, _NEVER)], -1)
    return Support(logits, torch.cat([labels.unsqueeze(-1), known.ids.clamp(min=0)], -1), torch.zeros_like(labels))


def completed(known: TopRows, labels: Int[Tensor, " tokens"], frozen: Float[Tensor, "tokens vocab"]) -> Support:
    """The whole vocabulary: log p_M on K and the label, else log m + log p_o(v) - log p_o(not K); `frozen` are l_o.

    A label that was told counts to K: m and p_o(not K) are without it.
    """
    inside = (known.ids == labels.unsqueeze(-1)).any(-1)
    told = ~(inside | known.label.isnan())
    mass = torch.where(told, known.tail - known.label.nan_to_num().exp(), known.tail).clamp(min=1e-30)
    # What is missing repeats another entry of its row: the label where that was told, else the first of K.
    known_ids = torch.cat([known.ids, torch.where(told, labels, known.ids[:, 0]).unsqueeze(-1)], -1)
    values = torch.cat([known.logprobs, torch.where(told, known.label, known.logprobs[:, 0]).unsqueeze(-1)], -1)
    missing = known_ids < 0
    known_ids, values = (torch.where(missing, some[:, -1:], some) for some in (known_ids, values))
    unseen = frozen.float().scatter(-1, known_ids, -torch.inf)
    others = unseen.logsumexp(-1, keepdim=True).clamp(min=_NEVER)  # with nothing outside K there is nothing to spread
    return Support((unseen + (mass.log().unsqueeze(-1) - others)).scatter(-1, known_ids, values), None, labels)
