"""How many tokens to ask for in one request."""

from dataclasses import dataclass

LONGEST = 64
MOST = 1024  # new tokens that one request may ask for; servers reserve memory by it


@dataclass
class Pace:
    """Draft length in tokens: the whole rest, at most `most` ("stream"), a fixed number, or adapting ("auto").

    "auto" doubles after a fully accepted draft and shrinks to the mean accepted run after a rejection, within [1, 64].
    """

    draft: str | int = "stream"
    most: int = MOST
    length: int = 16
    runs: int = 0
    accepted: int = 0

    def ask(self, remaining: int) -> int:
        """Tokens to ask for, at most what remains."""
        if self.draft == "stream":
            return min(remaining, self.most)
        return min(remaining, self.length if self.draft == "auto" else int(self.draft))

    def saw(self, accepted: int, *, rejected: bool) -> None:
        """Learn from a draft's end."""
        self.runs += 1
        self.accepted += accepted
        if rejected:
            self.length = max(1, min(LONGEST, round(self.accepted / self.runs)))
        else:
            self.length = min(LONGEST, self.length * 2)
