"""A call's prompt as token ids, by each model's own template."""

from collections.abc import Mapping, Sequence
from typing import Any

from uld_adapters.errors import UsageError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def render(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt: messages (or one text as the user's message) through the chat template; raw text as it is.

    Without a template a single text becomes a question on a line of its own, as in training.
    """
    if raw:
        if not isinstance(prompt, str):
            raise UsageError("raw=True takes text, not messages", hint="leave raw out, or pass a string")
        ids = list(tokenizer.encode(prompt))
    elif tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if not messages or any(not {"role", "content"} <= m.keys() for m in messages):
            raise UsageError("messages need a role and a content each", hint='pass [{"role": "user", "content": "..."}]')
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    elif isinstance(prompt, str):
        ids = list(tokenizer.encode(f"{prompt}\n"))
    else:
        raise UsageError("this tokenizer has no chat template", hint="pass one text instead of messages")
    if not ids:
        raise UsageError("the prompt is empty", hint="pass some text")
    return ids
