"""The contract between the client and a large model: draft, stream, score, probe."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from uld_adapters.logprobs import Draft, Score


@dataclass(frozen=True)
class ServerSampling:
    """How the server draws its draft; the default is greedy. Temperature is in units of 1/nats, None means off."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def greedy(self) -> bool:
        """Whether the server writes its most probable tokens."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Capabilities:
    """What a server was found to do when it was probed.

    `top_logprobs` is the k that will be asked for at each position (None: the whole vocabulary), `top_logprobs_cap` the
    server's own limit where it is known. `scoring` says how given text is scored: "prompt", in one request; "forced", by a bias that
    leaves the report raw; "drafts", for as long as the server writes the same. `processed` says that log-probabilities come after
    temperature, top-k and top-p. `sampling` names what the server can apply itself, in the order of `ServerSampling`; options of
    `exclusive` only one at a time. `continues` says that it can go on from a given answer; without it only its own answers stand.
    `context` is the largest number of prompt and answer tokens together.
    """

    model: str
    top_logprobs: int | None
    top_logprobs_cap: int | None = None
    processed: bool = False
    ids_in: bool = True
    ids_out: bool = True
    streams: bool = True
    continues: bool = True
    scoring: Literal["prompt", "forced", "drafts"] = "drafts"
    sampling: frozenset[str] = frozenset({"temperature", "top_k", "top_p", "min_p"})
    exclusive: frozenset[str] = frozenset()
    context: int | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Backend(Protocol):
    """A large model that drafts text and reports its top log-probabilities.

    A prefix is always token ids, the prompt's and the answer's so far. Every method may raise a BackendError; a draft
    that lacks log-probabilities at any of its positions must raise and never be returned. The one exception is the end of an
    answer that a server does not report: it comes as an end token whose position is `TopLogprobs.unreported()`.
    """

    name: str

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer (a transformers fast tokenizer)."""

    async def probe(self) -> Capabilities:
        """Find out once what the server can do, and check that it speaks the tokenizer's ids."""

    def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = ServerSampling()) -> AsyncGenerator[Draft]:
        """Let the server write up to n tokens after the prefix, and hand over the pieces as they arrive."""

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling = ServerSampling()) -> Draft:
        """Like `stream`, but one whole piece."""

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """Log p_M of each token of the continuation in nats, with K at each position."""

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """The ids from which the server can go on after this prefix.

        The prefix itself where the server takes ids. A server that takes text may tokenise it differently: then the ids
        that it will see, for the same text. None when the prefix cannot be sent at all (it ends inside a character).
        """

    async def aclose(self) -> None:
        """Close connections."""


@runtime_checkable
class TakesMessages(Protocol):
    """A backend whose server renders conversations itself, so that no ids stand for the prompt."""

    def answering(self, messages: Sequence[Mapping[str, str]]) -> Backend:
        """The same backend about this conversation: its prefixes hold the answer's ids alone."""
