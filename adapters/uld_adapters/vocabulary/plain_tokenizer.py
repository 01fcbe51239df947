"""A vocabulary in the place of a transformers tokenizer: for targets whose tokenizer is a file of tokens, such as tiktoken's."""

from collections.abc import Sequence

from uld_adapters.vocabulary.control import ends_answers
from uld_adapters.vocabulary.tokens import Vocabulary


class PlainTokenizer:
    """What backends and clients need of a tokenizer, without a chat template; text that looks like a control token is text."""

    chat_template = None
    bos_token = None
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.all_special_ids = sorted(vocabulary.control)

    def __len__(self) -> int:
        return self.vocabulary.rows

    @property
    def eos_token_id(self) -> int | None:
        """What ends an answer: an end of turn, else an end of text."""
        return ends_answers(self.vocabulary.roles, self.vocabulary.tokens)

    def get_added_vocab(self) -> dict[str, int]:
        """Control tokens by name."""
        return {self.vocabulary.tokens[token].decode(errors="replace"): token for token in self.all_special_ids}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; there is nothing to add."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        """The text of ids, what is no UTF-8 as U+FFFD."""
        kept = [token for token in ids if not (skip_special_tokens and token in self.vocabulary.control)]
        return b"".join(self.vocabulary.tokens[token] for token in kept).decode("utf-8", "replace")
