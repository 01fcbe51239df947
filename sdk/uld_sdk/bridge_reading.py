"""What a small model of another vocabulary thinks at one prefix, told in the remote's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from uld_adapters.vocabulary.bridge import Path, Place, Rows
from uld_adapters.vocabulary.shares import Shares, change, excess
from uld_adapters.vocabulary.tally import LEAST
from uld_offset_models.shift import Rule, shift_of

UNKNOWN = 50.0  # nats that a token may have which nobody asked about: with any tail the bound is then 1


class Weighing(Protocol):
    """`Bridge` or `SinglePath`."""

    def start(self) -> Place:
        """The place at the start of a text."""

    def begin(self, text: bytes) -> tuple[Path, Place]:
        """The place after a text that is known."""

    def step(self, place: Place, token: int) -> tuple[Path, Place]:
        """Go on by one of the remote's tokens."""

    def ends(self, place: Place) -> list[Path]:
        """The paths at which the small model may stand."""

    def cover(self, place: Place) -> Sequence[Path]:
        """These paths, and those that lead there."""

    def nodes(self, place: Place, candidates: Sequence[int], rows: Rows, *, ahead: Sequence[int] = (), least: float = LEAST) -> set[Path]:
        """The further paths whose rows `read` needs."""

    def read(self, place: Place, candidates: Sequence[int], rows: Rows, *, least: float = LEAST) -> Shares:
        """S(c) of the candidates."""


@dataclass(frozen=True)
class Bridging:
    """How a bridge is used: at most `tolerance` of total variation may come from open spellings (None: whatever comes)."""

    weighing: Weighing
    rows: int
    exact: bool = False
    tolerance: float = 0.01


@dataclass
class BridgedReading:
    """What the small model thinks at one prefix of the answer, told in the remote's tokens once these are known (`settle`).

    Where at none of the places at which it may stand any of its own tokens exceeds the uniform distribution by more than the
    margin, g is 0 by definition, whatever the remote reports: like a gate this is a function of the prefix alone. Elsewhere it is
    quiet if nothing that the remote reported has a shift.
    """

    bridging: Bridging
    rule: Rule
    at: int
    place: Place
    nodes: dict[Path, Any]
    rows: dict[Path, np.ndarray] = field(default_factory=dict)
    values: np.ndarray | None = None  # excess or change by the remote's ids: value, least, most
    quiet: bool = False
    beyond: float | None = None  # where it is quiet: the largest shift in nats of tokens that were not reported, unless that is none
    least: float = LEAST  # mass of the position below which a spelling is not looked at by itself

    @property
    def peak(self) -> float:
        """The largest excess (of a pair the largest size of a change) over the small model's tokens, in nats; 0 once it is quiet."""
        if self.quiet:
            return 0.0
        return float(max(self.nodes[path].peak for path in self.bridging.weighing.ends(self.place)))

    @property
    def width(self) -> int:
        """How many tokens the small model's vocabulary has."""
        return next(iter(self._known().values())).shape[1]

    @property
    def gate(self) -> float | None:
        """The largest c(x) of the places at which the small model may stand, None without a gate."""
        gates = [self.nodes[path].gate for path in self.bridging.weighing.ends(self.place)]
        return None if gates[0] is None else float(max(gates))

    def excess(self) -> np.ndarray:
        """Log s_a - log s_u, of a pair c (log s' - log s), in nats by the remote's ids, shape (rows,)."""
        return self._settled()[0]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the most that the excess can be, by the remote's ids."""
        _, least, most = self._settled()
        return least, most

    def frozen(self) -> None:
        """What the remote did not report cannot be told from another vocabulary."""

    def _settled(self) -> np.ndarray:
        if self.values is None:
            raise RuntimeError("the reading does not know yet which tokens the remote reported")
        return self.values

    def missing(self, ids: Sequence[int], ahead: Sequence[int] = ()) -> list[Path]:
        """What is still to be read so that these tokens can be judged."""
        return sorted(self.bridging.weighing.nodes(self.place, ids, self._known(), ahead=ahead, least=self.least))

    def _known(self) -> dict[Path, np.ndarray]:
        for path, node in self.nodes.items():
            if path not in self.rows:
                self.rows[path] = node.chances()
        return self.rows

    def settle(self, ids: Sequence[int]) -> Shares:
        """Judge the remote's tokens by what has been read; the reading is quiet if none of them can have a shift."""
        rule = self.rule
        shares = self.bridging.weighing.read(self.place, ids, self._known(), least=self.least)
        pair = rule.method == "offset"
        gate = self._gate_of(shares) if pair else None
        known = change(shares, gate) if pair else excess(shares)
        # Beyond the report: as large a shift as can be, which under a margin of ULD is none.
        unknown = UNKNOWN * (1.0 if gate is None else gate) if pair else -UNKNOWN
        self.values = np.full((3, self.bridging.rows), unknown)
        self.values[:, np.asarray(ids, dtype=np.int64)] = known
        largest = np.max(np.abs(known[1:]) if pair else known[2], initial=0.0 if len(ids) else np.inf)
        self.quiet = bool(largest <= rule.margin) and (pair or rule.margin > 0)
        proved = pair and unknown <= rule.margin
        self.beyond = max(0.0, float(shift_of(np.array(unknown), rule))) if self.quiet and not proved else None
        return shares

    def _gate_of(self, shares: Shares) -> float | None:
        """The gate at the places at which the small models stand, by the frozen one's weight, as in training."""
        gates = [(self.nodes[path].gate, float(weight[1])) for path, weight in shares.standing if path in self.nodes]
        if not gates or gates[0][0] is None:
            return None
        total = sum(weight for _, weight in gates)
        return sum(float(gate) * weight for gate, weight in gates if gate is not None) / total if total > 0 else float(gates[0][0])
