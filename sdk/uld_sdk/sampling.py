"""The user's sampling, applied to a distribution after unlearning, and random numbers keyed by (seed, position)."""

import secrets
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.errors import UsageError
from uld_offset_models.shift import logsumexp


@dataclass(frozen=True)
class Sampling:
    """Options of the field; temperature 0 is greedy. Order: temperature, top-k, top-p, min-p (that of transformers)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise UsageError(f"temperature is {self.temperature}", hint="give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}", hint="give 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", hint="give a share in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}", hint="give a share in [0, 1]")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}", hint="give 0 or more")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken at every position."""
        return self.temperature == 0.0

    @property
    def uncut(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_k is None and self.top_p in (None, 1.0) and not self.min_p

    @property
    def for_server(self) -> ServerSampling:
        """The same options for a server that samples its draft itself."""
        return ServerSampling(self.temperature, self.top_k, self.top_p, self.min_p)

    def with_fresh_seed(self) -> "Sampling":
        """The same options with a random seed."""
        return replace(self, seed=secrets.randbits(63))

    def server_can(self, capabilities: Capabilities) -> bool:
        """Whether the server's own sampler can apply all the options, in this order."""
        given = {name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None} | {"temperature"}
        return given <= capabilities.sampling and len(given & capabilities.exclusive) < 2


def process(logprobs: Float[np.ndarray, " n"], sampling: Sampling, *, tail: float = 0.0) -> Float[np.ndarray, " n"]:
    """Log-probabilities after temperature, top-k, top-p and min-p, normalised; cut tokens are -inf. Input: best first.

    `tail` is the probability of less likely tokens that are not in the input, where it is known after temperature: it
    counts in top-p's sum.
    """
    values = logprobs / sampling.temperature
    values = values - logsumexp(values)
    if sampling.top_k is not None and sampling.top_k < values.size:
        values = np.where(np.arange(values.size) < sampling.top_k, values, -np.inf)
        values = values - logsumexp(values)
    if sampling.top_p is not None and sampling.top_p < 1:
        mass = np.cumsum(np.exp(values))
        values = np.where(mass - np.exp(values) < sampling.top_p / (1.0 - tail), values, -np.inf)
        values = values - logsumexp(values)
    if sampling.min_p:
        values = np.where(values >= values[0] + np.log(sampling.min_p), values, -np.inf)
        values = values - logsumexp(values)
    return np.asarray(values)


def gumbel(seed: int, position: int, ids: np.ndarray) -> Float[np.ndarray, " n"]:
    """Gumbel noise for token ids at a position of the answer, a function of (seed, position, id) alone.

    argmax(log q + noise) is a draw from q (the Gumbel-max trick): which other tokens were reported does not matter, and
    neither does how the text was cut into drafts.
    """
    uniform = np.random.Generator(np.random.Philox(key=[seed, position])).random(int(ids.max()) + 1)
    return -np.log(-np.log(np.maximum(uniform[ids], 1e-300)))
