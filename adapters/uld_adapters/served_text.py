"""What backends share whose server takes text and splits it into tokens itself."""

from collections.abc import Sequence

from uld_adapters.errors import MalformedAnswer, TokenizerMismatch
from uld_adapters.served import ServedBackend


class TextServedBackend(ServedBackend):
    """Base of the backends that continue by text.

    A prefix goes out as its own text only where that text splits into just these ids; else the request starts at the last
    position where both agree, and the server must write the tokens between again.
    """

    _server_bos: int | None = None

    def _text(self, ids: Sequence[int]) -> str | None:
        """The text that the server will split into just these ids, None when there is none."""
        ids = list(ids)
        if self._server_bos is not None:
            if not ids or ids[0] != self._server_bos:
                return None
            ids = ids[1:]
        if not ids:
            return None
        text = self._decoded(ids)
        if text.endswith("\ufffd") or self._encoded(text) != ids:
            return None
        return text

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """The ids that the server will see for the prefix's text; None when that ends inside a character, or spells a control token."""
        if self._text(prefix) is not None:
            return prefix
        head = list(prefix[:1]) if self._server_bos is not None else []
        text = self._decoded(prefix[len(head) :])
        if "\ufffd" in text:
            return None
        ids = [*head, *self._encoded(text)]
        if not set(ids).intersection(self.tokenizer.all_special_ids) <= set(prefix):
            return None
        return ids if self._text(ids) is not None else None

    def _sendable(self, prefix: Sequence[int]) -> tuple[int, str]:
        """The longest beginning of the prefix that can be sent: how many ids, and their text."""
        for start in range(len(prefix), 0, -1):
            text = self._text(prefix[:start])
            if text is not None:
                return start, text
        bos = "" if self._server_bos is None else f"; it puts the token {self._server_bos} in front of every text"
        raise TokenizerMismatch(
            f"the prompt cannot be sent as text: {self.name} would split it into other tokens{bos}",
            hint="render the prompt as text that starts like the server's own (the chat template does)",
        )

    def check_repeated(self, token: int, expected: int) -> None:
        """Compare a token that the server had to write again with the one that stands."""
        if token != expected:
            raise MalformedAnswer(f"{self.name} did not repeat its own greedy tokens", hint="its answers are not reproducible; try again")
