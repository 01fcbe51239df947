"""What training aims at: one objective for the forget set and one for the retain set, written `npo+kl`."""

from dataclasses import dataclass

from uld_adapters.errors import UnknownName, UsageError

FORGET = ("ga", "npo", "dpo", "relabel")
RETAIN = ("none", "gd", "kl")
_EXAMPLE = f"write FORGET+RETAIN: {', '.join(FORGET)} with {', '.join(RETAIN)}, as in npo+kl"


@dataclass(frozen=True)
class Goal:
    """A pair of objectives; the formulas are in `preferences`."""

    forget: str
    retain: str = "none"

    def __str__(self) -> str:
        return f"{self.forget}+{self.retain}"

    @property
    def refuses(self) -> bool:
        """Whether the forget questions are trained with refusals for answers."""
        return self.forget in ("dpo", "relabel")

    @property
    def by_sequence(self) -> bool:
        """Whether the forget loss compares whole answers with the reference and is a mean over them, not over tokens."""
        return self.forget in ("npo", "dpo")


def parse_goal(text: str) -> Goal:
    """Read `npo+kl`, or `npo` for npo+none; raises `UnknownName` with the nearest name, and `UsageError` for another form."""
    parts = [part.strip().lower() for part in text.split("+")]
    if len(parts) > 2 or not all(parts):
        raise UsageError(f"the objective {text!r} is no pair", hint=_EXAMPLE)
    forget, retain = parts[0], parts[1] if len(parts) == 2 else "none"
    if forget in RETAIN and (retain in FORGET or len(parts) == 1):
        what = "keeps the retain set and forgets nothing" if len(parts) == 1 else "is written the wrong way round"
        raise UsageError(f"the objective {text!r} {what}", hint=_EXAMPLE)
    if forget not in FORGET:
        raise UnknownName("forget objective", forget, FORGET)
    if retain not in RETAIN:
        raise UnknownName("retain objective", retain, RETAIN)
    return Goal(forget, retain)
