"""Whose chat template renders the large model's prompts, and when there is reason to doubt that it is the right one."""

from pathlib import Path

from uld_adapters.backend import Backend
from uld_adapters.chat_rendering import renders_alike


class TemplateWarning(UserWarning):
    """The large model's prompts are rendered by the assistant's chat template, which may not be the large model's own."""


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


def _plain(name: str) -> str:
    """A model's name without folder, owner and suffix."""
    return Path(name).name.removesuffix(".gguf").casefold()
