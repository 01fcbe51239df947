"""What has been written of an answer: its tokens, its text, and the split in which the server sees them."""

from collections.abc import Sequence
from typing import Any

from uld_sdk.text import TextStream


class Written:
    """The answer so far after a prompt of the remote's ids.

    A server that takes text splits it anew with each request. `prefix` is prompt and answer in the server's split; `tokens`
    follows it as far as it can, and is what the small model reads.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.prompt = list(prompt)
        self.tokens: list[int] = []
        self.text = TextStream(tokenizer, stop)
        self._head, self._covered = self.prompt, 0  # what the server sees as the prompt and the first `_covered` tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prefix(self) -> list[int]:
        """Prompt and answer in the server's split."""
        return [*self._head, *self.tokens[self._covered :]]

    def push(self, token: int) -> str:
        """Take one more token; returns the text that it releases."""
        self.tokens.append(token)
        return self.text.push(token)

    def adopt(self, resumed: Sequence[int] | None) -> int | None:
        """Go on from the split that the server will see; returns how many tokens stay as they were, None when all do.

        Where even the prompt's last token joins the answer's first, only the server's side changes: the small model keeps its
        own prompt, and the tokens as they were written.
        """
        if resumed is None or list(resumed) == self.prefix:
            return None
        if list(resumed[: len(self._head)]) != self._head:
            self._head, self._covered = list(resumed), len(self.tokens)
            return len(self.tokens)
        old, self.tokens = self.tokens, [*self.tokens[: self._covered], *resumed[len(self._head) :]]
        self.text.resplit(self.tokens)
        return next((i for i, (a, b) in enumerate(zip(self.tokens, old, strict=False)) if a != b), min(len(self.tokens), len(old)))
