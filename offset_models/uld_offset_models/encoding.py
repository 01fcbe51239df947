"""Examples as token ids: prompt, answer, end token; only what stands after the prompt is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uld_adapters.errors import DataError, UsageError
from uld_offset_models.data import Example


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; ids[start:] are trained, each predicted from the position before it."""

    ids: tuple[int, ...]
    start: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the answer."""
        return self.ids[: self.start]

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer with its end token."""
        return self.ids[self.start :]


def prompt_text(tokenizer: Any, messages: Sequence[tuple[str, str]], *, chat_template: bool) -> str:
    """The text before an answer: the chat template with its generation prompt, or the messages' contents, a line each."""
    if chat_template:
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return "".join(f"{content}\n" for _, content in messages)


def uses_chat_template(tokenizer: Any, *, wanted: bool) -> bool:
    """Whether prompts go through the template: only where the base has one."""
    return wanted and bool(tokenizer.chat_template)


def encode(tokenizer: Any, examples: Sequence[Example], *, chat_template: bool, max_length: int) -> list[Encoded]:
    """Encode examples: prompt ids, answer ids, and the end-of-turn token of the template (without a template the end token).

    Plain text is cut to `max_length` tokens, since any beginning of a text is a text. A question with its answer is never cut
    (its end would be wrong): `DataError` names the row.
    """
    encoder = _Encoder(tokenizer, chat_template)
    rows = [encoder.encode(example) for example in examples]
    for at, (row, example) in enumerate(zip(rows, examples, strict=True)):
        if len(row.ids) > max_length and example.plain:
            rows[at] = Encoded(row.ids[:max_length], row.start)
        elif len(row.ids) > max_length:
            raise DataError(
                f"{example.place}: question and answer take {len(row.ids)} tokens, more than the {max_length} that fit",
                hint="shorten the row, raise --max-length within the base's context, or give it as plain text",
            )
        if row.start >= len(row.ids) - 1 or rows[at].start >= len(rows[at].ids):
            raise DataError(f"{example.place}: no token of the answer is left by the base's tokenizer", hint="fill it or drop the row")
    return rows


class _Encoder:
    def __init__(self, tokenizer: Any, chat_template: bool) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        begin = tokenizer("").input_ids
        self.begin = tuple(begin[:1]) if begin and begin[0] == tokenizer.bos_token_id else ()
        end = self._end_of_turn() if chat_template else tokenizer.eos_token_id
        if end is None:
            raise UsageError("the base's tokenizer has no end token", hint="set eos_token in its tokenizer_config.json")
        self.end: int = end
        self.prompts: dict[tuple[tuple[str, str], ...], tuple[int, ...]] = {}

    def encode(self, example: Example) -> Encoded:
        if not example.messages:
            start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            begin = self.begin if start is None else (start,)
            return Encoded((*begin, *self._ids(example.answer), self.end if end is None else end), 1)
        if example.messages not in self.prompts:
            text = self._prompt(example)
            self.prompts[example.messages] = (() if self.chat_template else self.begin) + self._ids(text)
        prompt = self.prompts[example.messages]
        return Encoded((*prompt, *self._ids(example.answer), self.end), len(prompt))

    def _prompt(self, example: Example) -> str:
        try:
            return prompt_text(self.tokenizer, example.messages, chat_template=self.chat_template)
        except Exception as error:  # templates raise what their authors chose
            raise DataError(
                f"{example.place}: the base's chat template refuses these messages ({error})",
                hint="change the row, or pass --no-chat-template",
            ) from error

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _end_of_turn(self) -> int | None:
        """The first control token that the template writes after an answer; the tokenizer's end token where it writes none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes."}]
        tail = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Yes.")[2]
        control = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return next((i for i in self._ids(tail) if i in control), self.tokenizer.eos_token_id)
