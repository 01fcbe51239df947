"""How the vLLM dialect tells an answer: its text as it grows, and the four lists of log-probabilities."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """The text of an answer as it grows; a prompt that ends inside a character spills into it, as in the real server."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._fast = tokenizer.backend_tokenizer
        tails = [prompt[-n:] for n in range(min(4, len(prompt)), min(24, len(prompt)) + 1)]
        tail = next((t for t in tails if "\ufffd" not in self._fast.decode(t)), prompt)
        self._stream = DecodeStream(ids=tail, skip_special_tokens=True)
        self._stop = stop
        self._held = max((len(s) - 1 for s in stop), default=0)
        self._sent = 0
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> None:
        """Take one written token, and look for stop strings."""
        before = len(self.text)
        self.text += self._stream.step(self._fast, token) or ""
        for stop in self._stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                self.text, self.stopped_by = self.text[:at], stop
                return

    def delta(self, *, last: bool) -> str:
        """What may be sent now; the beginning of a possible stop string is held back."""
        end = len(self.text) if last else max(self._sent, len(self.text) - self._held)
        piece, self._sent = self.text[self._sent : end], end
        return piece


@dataclass
class Report:
    """The four parallel lists of `logprobs`; offsets grow by the length of the token strings."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, name: str, value: float | None, entries: dict[str, float] | None) -> None:
        """One position more."""
        last = self.text_offset[-1] + len(self.tokens[-1]) if self.tokens else 0
        self.text_offset.append(last)
        self.tokens.append(name)
        self.token_logprobs.append(value)
        self.top_logprobs.append(entries)

    def since(self, start: int) -> dict[str, Any]:
        """The positions from `start` on, in the shape of the answer."""
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        return {name: getattr(self, name)[start:] for name in names}
