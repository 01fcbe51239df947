"""Several small models beside one large model: g is the sum of their shifts, each by its own rule."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from uld_offset_models.shift import Bounds, Rule, SmallReading


@dataclass(frozen=True)
class JointReading:
    """What several small models think at one prefix, a reading each."""

    parts: tuple[SmallReading, ...]

    @property
    def peak(self) -> float:
        """The largest of their peaks in nats."""
        return self._loudest.peak

    @property
    def gate(self) -> float | None:
        """c(x) of the one with the largest peak, None where that has no gate."""
        return self._loudest.gate

    @property
    def beyond(self) -> float | None:
        """The largest shift that unreported tokens may have by those that are quiet (`BridgedReading.beyond`), None without such."""
        known = [value for part in self.parts if (value := getattr(part, "beyond", None)) is not None]
        return sum(known) if known else None

    @property
    def _loudest(self) -> SmallReading:
        return max(self.parts, key=lambda part: part.peak)


@dataclass(frozen=True)
class JointRule:
    """The rules of several small models, in the order of a `JointReading`'s parts.

    g(y) = sum_i g_i(y), each by its own alpha and margin. A position is touched where one of them touches it; those that do not add
    nothing there and do not filter. The filter is the strictest of those that do: F is the intersection of theirs. For tokens that
    were not reported stands the frozen model of the first of them that has the tail policy `complete`.
    """

    rules: tuple[Rule, ...]

    def touching(self, reading: JointReading) -> tuple[int, ...]:
        """The places of those whose shift is not 0 everywhere at this prefix; they read the prefix only."""
        return tuple(at for at, (rule, part) in enumerate(zip(self.rules, reading.parts, strict=True)) if rule.touching(part))

    def shift(self, reading: JointReading) -> Float[np.ndarray, " rows"]:
        """The shift g in nats for every token; there must be one that touches."""
        return np.sum([rule.shift(part) for rule, part in self._acting(reading)], axis=0)

    def bounds(self, reading: JointReading) -> Bounds | None:
        """The least and the largest shift in nats that each token can have, None where `shift` is exact."""
        found = [(rule.bounds(part), rule, part) for rule, part in self._acting(reading)]
        if all(ends is None for ends, _, _ in found):
            return None
        ends = [ends or (rule.shift(part),) * 2 for ends, rule, part in found]
        return np.sum([low for low, _ in ends], axis=0), np.sum([high for _, high in ends], axis=0)

    def ratio(self, reading: JointReading) -> float:
        """The filter's ratio r at this prefix."""
        return max(rule.ratio(part) for rule, part in self._acting(reading))

    def frozen(self, reading: JointReading) -> Float[np.ndarray, " rows"] | None:
        """Log p_o in nats of the model that stands for unreported tokens at this prefix, None where there is none."""
        known = (rule.frozen(part) for rule, part in self._acting(reading))
        return next((frozen for frozen in known if frozen is not None), None)

    def _acting(self, reading: JointReading) -> list[tuple[Rule, SmallReading]]:
        return [(self.rules[at], reading.parts[at]) for at in self.touching(reading)]
