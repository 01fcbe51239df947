"""The two shapes in which the OpenAI dialect answers: chat completions and completions, whole and in chunks."""

from dataclasses import dataclass
from typing import Any, Protocol

from uld_adapters.emulator.desk import Step
from uld_adapters.emulator.openai_request import Plan
from uld_adapters.emulator.openai_text import Names, chat_entry, completion_lists


@dataclass(frozen=True)
class Piece:
    """What is sent at once: text, tokens with the places of their texts, how the answer ended, and how many tokens it has so far."""

    text: str
    steps: list[tuple[Step, int]]
    finish: str | None
    written: int


class Form(Protocol):
    """A route's shape; `tells_end` says that the token which ends an answer is among the reported ones."""

    prefix: str
    whole_kind: str
    chunk_kind: str
    tells_end: bool

    def opening(self) -> list[dict[str, Any]]:
        """Choices that are sent before anything is written."""

    def chunks(self, plan: Plan, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """Choices that tell a piece, one an event."""

    def whole(self, plan: Plan, piece: Piece) -> dict[str, Any]:
        """The choice that tells a whole answer."""


class Chat:
    """`/v1/chat/completions`: an entry with bytes a token; the token that ends an answer is not told."""

    prefix, whole_kind, chunk_kind, tells_end = "chatcmpl", "chat.completion", "chat.completion.chunk", False

    def __init__(self, names: Names) -> None:
        self._names = names

    def _report(self, plan: Plan, piece: Piece) -> dict[str, Any] | None:
        if plan.top is None:
            return None
        return {"content": [chat_entry(self._names, step.raw, step.token, plan.top) for step, _ in piece.steps], "refusal": None}

    def _choice(self, delta: dict[str, Any], report: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": report, "finish_reason": finish}

    def opening(self) -> list[dict[str, Any]]:
        """The role."""
        return [self._choice({"role": "assistant", "content": "", "refusal": None})]

    def chunks(self, plan: Plan, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """The text with its tokens, and by itself the reason of the end."""
        told = [self._choice({"content": piece.text}, self._report(plan, piece))] if piece.text or piece.steps else []
        return [*told, self._choice({}, finish=piece.finish)] if piece.finish else told

    def whole(self, plan: Plan, piece: Piece) -> dict[str, Any]:
        """A message."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None, "annotations": []}
        return {"index": 0, "message": message, "logprobs": self._report(plan, piece), "finish_reason": piece.finish}


class Completions:
    """`/v1/completions`: parallel lists of strings; offsets count from the beginning of the prompt."""

    prefix, whole_kind, chunk_kind, tells_end = "cmpl", "text_completion", "text_completion", True

    def __init__(self, names: Names) -> None:
        self._names = names

    def opening(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def chunks(self, plan: Plan, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """The text with its tokens; an echo comes with the first."""
        report = None
        if plan.top is not None:
            moved = [(step, len(plan.before) + offset) for step, offset in piece.steps]
            report = completion_lists(self._names, moved, plan.top)
        text = plan.before + piece.text if plan.echo and first else piece.text
        return [{"text": text, "index": 0, "logprobs": report, "finish_reason": piece.finish}]

    def whole(self, plan: Plan, piece: Piece) -> dict[str, Any]:
        """All of it as one chunk."""
        return self.chunks(plan, piece, first=True)[0]
