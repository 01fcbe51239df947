"""The words of `prompts.yaml` and `templates.yaml`, and how a reply that lists texts is read."""

import re
from functools import cache
from importlib.resources import files
from typing import Any

from uld_sdk.augmentation.tasks import Task

_MARK = re.compile(r"^(?:\(?\d{1,2}[.):]|[-*•–])\s+")
_LABEL = re.compile(r"^(?:question|answer|wrong answer|q|a)\s*\d*\s*:\s*", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


@cache
def wording(name: str) -> Any:
    """The content of one of the package's YAML files."""
    import yaml

    return yaml.safe_load((files("uld_sdk.augmentation") / f"{name}.yaml").read_text(encoding="utf-8"))


def instruction(task: Task) -> str:
    """What a server is asked for a task: for all that the task wants, also when it is asked again."""
    return wording("prompts")[task.kind].format(n=task.wanted, question=task.question, answer=task.answer)


def listed(reply: str, *, cut: bool = False) -> list[str]:
    """The texts that a reply lists, one a line; of a reply that was cut off all but the last.

    Where lines carry numbers or bullets, the others are talk. Marks, labels and quotation marks around a text are taken off.
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    if cut:
        lines = lines[:-1]
    marked = [line for line in lines if _MARK.match(line)]
    return [text for line in marked or [line for line in lines if not line.endswith(":")] if (text := _bare(line))]


def _bare(line: str) -> str:
    text = _MARK.sub("", line)
    if text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    text = _LABEL.sub("", text).strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
