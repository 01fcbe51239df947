"""What a call returns: text, ids, and a report that says what was done and how sure it is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Step:
    """One position of an answer, kept with trace=True.

    `remote_id` is what the remote wrote there, `gate` the assistant's c(x), `peak` its largest log p_a - log u in nats (an
    upper bound where that settled it); of several assistants those of the one with the largest peak.
    """

    token_id: int
    text: str
    remote_id: int
    remote_text: str
    gate: float | None
    peak: float | None
    touched: bool
    changed: bool
    exact: bool

    @classmethod
    def at(cls, tokenizer: Any, token: int, remote: int, reading: Any, *, touched: bool, exact: bool) -> Self:
        """The step of a position with the small model's reading there, None without one."""
        words = [tokenizer.decode([each]) for each in (token, remote)]
        peak, gate = (None, None) if reading is None else (reading.peak, reading.gate)
        return cls(token, words[0], remote, words[1], gate, peak, touched, touched and token != remote, exact)


@dataclass
class Report:
    """How an answer came about.

    `requests` counts HTTP requests, failed ones and those that ask a position again included (a local model makes none).
    `drafted` tokens came from the server, `accepted` stood. Of `positions` verified, `untouched` are proved to be the
    remote's own, `changed` carry another token than the remote wrote, `exact` are those of the full-vocabulary distribution, by
    nothing but what was reported; at the others the total variation is at most `largest_bound`, and at `completed` of these the
    frozen small model stood for the tokens that were not reported (tail policy `complete`). `touched_by` counts for each
    assistant, by its folder, the positions that it moves. `retokenised` counts how often a
    server that takes text only was continued from another split of the same text, `neutral` the reported tokens that nobody
    could tell from others (half characters without their bytes): they are never chosen.

    `alignment` says how the assistant's tokens were told in the remote's: identity, permutation, bridge, bridge-exact, or path
    (approximate, with no bound). Under a bridge a position may be untouched as far as it was reported only: then the claim holds
    but for a probability of at most `untouched_but_for` a position, the mass of the tokens that were not reported.
    """

    mode: str = "greedy"
    alignment: str = "identity"
    top_logprobs: int | None = None
    requests: int = 0
    drafted: int = 0
    accepted: int = 0
    positions: int = 0
    untouched: int = 0
    changed: int = 0
    exact: int = 0
    largest_bound: float = 0.0
    untouched_but_for: float = 0.0
    completed: int = 0
    touched_by: dict[str, int] = field(default_factory=dict)
    retokenised: int = 0
    neutral: int = 0
    seconds_server: float = 0.0
    seconds_small: float = 0.0
    seconds_total: float = 0.0
    seconds_first_token: float | None = None
    trace: tuple[Step, ...] = ()

    def count_touching(self, assistants: Sequence[str]) -> bool:
        """Count a position that these assistants touch; whether there are any."""
        for name in assistants:
            self.touched_by[name] += 1
        return bool(assistants)


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt (None where only the server can count them, and did not) and of the answer (the end token counts)."""

    prompt_tokens: int | None
    completion_tokens: int


@dataclass(frozen=True)
class Result:
    """An answer. `finish_reason` is "stop" (end token or stop string), "length" or "refusal"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    report: Report = field(repr=False)
    stop_sequence: str | None = None

    @property
    def untouched(self) -> bool:
        """Whether every position is proved untouched.

        Greedy and in pass-through the answer is then the remote's own, token for token. With a seed (mode match) it is drawn here, from
        the remote's own probabilities alone; `report.largest_bound` tells how far the top k is from the whole distribution.
        """
        return self.finish_reason != "refusal" and self.report.untouched == self.report.positions

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of all of it."""
        return {**asdict(self), "token_ids": list(self.token_ids), "untouched": self.untouched}


@dataclass(frozen=True)
class Piece:
    """A piece of a stream: verified text and ids. The last one carries `finish_reason` and the whole `result`.

    After a refusal `replaces` is set: what was streamed before is to be taken back, and `text` is the refusal.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    result: Result | None = None
    replaces: bool = False


@dataclass(frozen=True)
class ScoreResult:
    """Log-probability of a given text under the unlearned model, in nats: `lower` <= log q <= `upper`, a value a token.

    The bounds differ where the server's top k leaves the normaliser or the token itself open; -inf means that the token is
    outside the kept set, so that the unlearned model never writes it. `estimates` lie between them: the upper bounds, or under
    the tail policy `complete` what the frozen small model makes of the unreported tail.
    """

    token_ids: tuple[int, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    untouched: int
    estimates: tuple[float, ...]

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the whole text's log-probability in nats."""
        return sum(self.lower), sum(self.upper)

    @property
    def logprob(self) -> float:
        """The whole text's log-probability in nats, by the estimates."""
        return sum(self.estimates)

    @property
    def exact(self) -> bool:
        """Whether the bounds are one value."""
        return self.lower == self.upper
