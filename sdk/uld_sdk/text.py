"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

from uld_adapters.errors import UsageError


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of a call as a tuple; an empty one is an error."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not isinstance(s, str) or not s for s in strings):
        raise UsageError("a stop string is empty", hint="leave it out")
    return strings


class TextStream:
    """Decodes an answer's growing ids; `released` is the text that may be shown.

    Held back: bytes of an unfinished character, and an ending that may become a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # decoding restarts here, so that spaces that depend on the token before come out right
        self._read = 0
        self._text = ""
        self.released = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """Take one more id; returns the text that it releases."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if not now.endswith("\ufffd") and len(now) >= len(before):
            self._text += now[len(before) :]
            self._context, self._read = self._read, len(self._ids)
        return self._release(final=False)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def resplit(self, ids: Sequence[int]) -> None:
        """Go on from another split of the same text."""
        self._ids = list(ids)
        self._context, self._read = 0, len(self._ids)
        self._text = self._decode(self._ids)

    def finish(self) -> str:
        """Release what was held back, an unfinished character as U+FFFD."""
        if self._read < len(self._ids):
            before = self._decode(self._ids[self._context : self._read])
            self._text += self._decode(self._ids[self._context :])[len(before) :]
            self._read = len(self._ids)
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        if self.stopped is not None:
            return ""
        found = [(at, stop) for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            end, self.stopped = min(found)
        elif final:
            end = len(self._text)
        else:
            end = len(self._text) - max((self._overlap(stop) for stop in self._stop), default=0)
        piece = self._text[len(self.released) : end]
        self.released += piece
        return piece

    def _overlap(self, stop: str) -> int:
        return next((n for n in range(min(len(stop) - 1, len(self._text)), 0, -1) if self._text.endswith(stop[:n])), 0)
