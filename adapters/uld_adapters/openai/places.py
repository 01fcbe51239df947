"""Where servers of completions say that their tokens begin (`text_offset`): a place out of order shows a lost event."""

from collections.abc import Mapping, Sequence

from uld_adapters.errors import MalformedAnswer

# Servers count from the prompt's end or from the answer's beginning, and broken characters in several ways. A rule is what
# the first place is, and what the places grow by.
ORIGINS = ("nothing", "characters", "bytes", "ids")
UNITS = ("characters", "bytes", "names")
Rule = tuple[str, str]
RULES = frozenset((origin, unit) for origin in ORIGINS for unit in UNITS)


def origins(prompt: Sequence[int] | str, text: str) -> Mapping[str, int]:
    """What each origin is for a prompt, sent as ids or text, that spells `text`."""
    counted = 0 if isinstance(prompt, str) else len(prompt)
    return {"nothing": 0, "characters": len(text), "bytes": len(text.encode()), "ids": counted}


class Passage:
    """Follows one answer by the rules that the server may count by; `rules` are those that hold so far.

    A server whose first place fits none counts in a way of its own, and nothing is compared.
    """

    def __init__(self, rules: frozenset[Rule], start: Mapping[str, int]) -> None:
        self.rules = rules
        self._start = start
        self._written = dict.fromkeys(UNITS, 0)

    def follow(self, names: Sequence[str], places: Sequence[int], text: str) -> None:
        """Take one event; raises MalformedAnswer where it does not follow the one before."""
        if self.rules and places and min(places) >= 0:
            known = self.rules != RULES
            self.rules = frozenset(rule for rule in self.rules if self._start[rule[0]] + self._written[rule[1]] == places[0])
            if known and not self.rules:
                raise MalformedAnswer("an event of the server's stream was lost or came twice")
        self._written["characters"] += len(text)
        self._written["bytes"] += len(text.encode())
        self._written["names"] += sum(map(len, names))
