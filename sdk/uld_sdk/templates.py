"""Whose chat template renders the large model's prompts, and when there is reason to doubt that it is the right one."""

from pathlib import Path

from uld_adapters.backend import Backend
from uld_adapters.chat_rendering import renders_alike


class TemplateWarning(UserWarning):
    """The large model's prompts are rendered by the assistant's chat template, which may not be its own, or by none at all."""


async def template_doubt(backend: Backend, served: str, base: str) -> str | None:
    """What to say of a borrowed template: nothing where the server renders alike, or serves the assistant's own base.

    `served` is the large model's name as the server gives it, `base` the assistant's base.
    """
    if _plain(served) == _plain(base):
        return None
    alike = await renders_alike(backend, backend.tokenizer)
    if alike:
        return None
    fact = f"the server does not tell how {served} renders messages" if alike is None else f"{served} renders messages in another form"
    return (
        f"no tokenizer was given, so prompts are rendered as for the assistant's base {base}, and {fact};"
        " pass tokenizer=... (--tokenizer) of the served model"
    )


def no_template(backend: Backend, *, trained: bool) -> str | None:
    """What to say of a tokenizer that has no template; `trained` is whether an assistant saw its prompts through one."""
    if not trained or backend.tokenizer.chat_template:
        return None
    return (
        "the large model's tokenizer has no chat template, so its prompts are plain lines, though the assistant was trained with one;"
        " pass tokenizer=... (--tokenizer) that has it, route='chat' with openai, or the whole prompt with raw=True"
    )


def _plain(name: str) -> str:
    """A model's name without folder, owner and suffix."""
    return Path(name).name.removesuffix(".gguf").casefold()
