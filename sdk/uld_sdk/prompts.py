"""A call's prompt as token ids: the large model's by its own template, the assistant's as it was trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from uld_adapters.errors import ContextExceeded, UsageError
from uld_adapters.vocabulary.words import utf8
from uld_offset_models.encoding import prompt_text

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
_MESSAGES = 'pass [{"role": "user", "content": "..."}]'


def render(tokenizer: Any, prompt: Prompt, *, raw: bool = False, whose: str = "the model's") -> list[int]:
    """Token ids of a prompt: messages (or one text as the user's message) through the chat template; raw text as it is.

    Without a template a single text becomes a question on a line of its own, as in training. `whose` names the template in errors.
    """
    if raw:
        return _some(list(tokenizer.encode(_raw_text(prompt))))
    messages = conversation(prompt)
    if tokenizer.chat_template:
        try:
            return _some(list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]))
        except UsageError:
            raise
        except Exception as error:  # templates raise what their authors chose
            raise UsageError(f"{whose} chat template refuses these messages: {error}", hint="change roles or their order") from error
    if isinstance(prompt, str):
        return _some(list(tokenizer.encode(f"{prompt}\n")))
    raise UsageError("this tokenizer has no chat template", hint="pass one text instead of messages")


def render_as_trained(tokenizer: Any, prompt: Prompt, *, raw: bool = False, chat_template: bool) -> list[int]:
    """Token ids of a prompt for an assistant, in the form in which its training saw prompts (`uld_offset_models.encoding`).

    `chat_template` is what its manifest says: through the template, or the messages' contents, a line each. Raw text begins as
    rows of plain text do, with the first token of the vocabulary's texts where there is one.
    """
    if chat_template and not raw:
        return render(tokenizer, prompt, whose="the assistant's")
    start = tokenizer.bos_token_id
    if raw:
        ids = list(tokenizer.encode(_raw_text(prompt)))
        return ids if start is None or ids[:1] == [start] else [start, *ids]
    text = prompt_text(tokenizer, [(message["role"], message["content"]) for message in conversation(prompt)], chat_template=False)
    begin = [start] if start is not None and list(tokenizer("").input_ids[:1]) == [start] else []
    return [*begin, *tokenizer(text, add_special_tokens=False).input_ids]


def check_prompt(prompt: Prompt, *, raw: bool) -> None:
    """Raise `UsageError` for what no template is needed to see: no text at all, none that is Unicode, or messages without roles."""
    if raw:
        utf8(_raw_text(prompt), what="the prompt")
        return
    for number, message in enumerate(conversation(prompt), 1):
        for field in ("role", "content"):
            utf8(message[field], what="the prompt" if isinstance(prompt, str) else f"the {field} of message {number}")


def check_room(prompt: int, new: int, context: int | None, *, whose: str) -> None:
    """Raise `ContextExceeded` where so many tokens of prompt and answer do not fit; `context` None is not known."""
    if context is not None and prompt + new > context:
        room = context - prompt
        raise ContextExceeded(
            f"{prompt} prompt tokens and {new} new ones exceed {whose} context of {context}",
            hint=f"max_new_tokens can be at most {room}" if room > 0 else "shorten the prompt",
        )


def _raw_text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise UsageError("raw=True takes text, not messages", hint="leave raw out, or pass a string")
    if not prompt:
        raise UsageError("the prompt is empty", hint="pass some text")
    return prompt


def conversation(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as messages, one text as the user's; raises `UsageError` for what is neither."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UsageError("the prompt is empty", hint="pass some text")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
        raise UsageError(f"the prompt is {type(prompt).__name__}, neither text nor messages", hint=f"pass a text, or {_MESSAGES}")
    messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
    if not messages:
        raise UsageError("there are no messages", hint=_MESSAGES)
    if not all(isinstance(message.get(field), str) for message in messages for field in ("role", "content")):
        raise UsageError("messages need a role and a content each, as text", hint=_MESSAGES)
    return messages


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise UsageError("the prompt is empty", hint="pass some text")
    return ids
