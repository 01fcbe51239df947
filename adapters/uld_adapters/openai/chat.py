"""`/v1/chat/completions`: a conversation that the server renders itself, tokens as bytes, an answer continued by a message."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from uld_adapters.backend import Capabilities
from uld_adapters.errors import BackendError, ContinuationUnavailable, MalformedAnswer, RequestRejected, UsageError
from uld_adapters.logprobs import Draft
from uld_adapters.openai.names import Told, chat_positions
from uld_adapters.openai.server import COMPARED, LOOKAHEAD, OpenAIServer, alike

PROBE = ({"role": "user", "content": "Count from one to twelve in words."},)
# How servers are asked to go on from a message: fields of the message, fields of the request.
PREFILLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "continue_final_message": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "prefix": ({"prefix": True}, {}),
    "plain": ({}, {}),
}
NO_PREFILL = (
    "the server's chat cannot continue an answer: where the assistant changes a token, the call raises;"
    " use on_touched='refuse', route='completions', or a server that continues a last message of the assistant's"
)
CLOSED = (
    "it is not known how the server splits text, so that its tokenizer is not compared and no answer is continued: where the assistant"
    " changes a token, the call raises; use on_touched='refuse', or pass tokenizer=... of the served model"
)


class ChatBackend(OpenAIServer):
    """A server of the OpenAI kind, asked by messages; prefixes are the ids of the answer alone."""

    _route = "/chat/completions"
    messages: Sequence[Mapping[str, str]] = ()
    _prefill: str | None = None
    _keeps_space = False

    def answering(self, messages: Sequence[Mapping[str, str]]) -> Self:
        """The same backend about this conversation."""
        about = copy.copy(self)
        about.messages = tuple(messages)
        return about

    def _text(self, ids: Sequence[int]) -> str | None:
        """As text, None where the server would cut white space off its ends."""
        text = super()._text(ids)
        return text if text is None or self._keeps_space or text == text.strip() else None

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """The ids that the server will see for the answer's text; None when it cannot go on from it."""
        if not prefix:
            return prefix
        return None if self._prefill is None else super().resume(prefix)

    def unscorable(self, done: int) -> BackendError:
        """The error for a text that cannot be gone on with after `done` of its tokens."""
        if self._prefill is not None:
            return super().unscorable(done)
        return ContinuationUnavailable(
            f"{self.name} cannot score this text: the server would have to go on after its first {done} tokens",
            hint="pass route='completions' if the server has it, or use one that continues a last message of the assistant's",
        )

    def _begun(self, prefix: Sequence[int]) -> tuple[int, dict[str, Any]]:
        if not self.messages:
            raise UsageError("a chat API takes messages, not text", hint="pass route='completions' if the server has it")
        for start in range(len(prefix) if self._prefill else 0, 0, -1):
            text = self._text(prefix[:start])
            if text is not None:
                return start, self._begun_by(text)
        return 0, {"messages": [dict(message) for message in self.messages]}

    def _begun_by(self, text: str) -> dict[str, Any]:
        in_message, in_body = PREFILLS[self._prefill or "plain"]
        messages = [*(dict(message) for message in self.messages), {"role": "assistant", "content": text, **in_message}]
        return {"messages": messages, **in_body}

    def _asked(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": self.top_logprobs}

    def _told(self, choice: dict[str, Any], opened: Any) -> tuple[list[Told], str]:
        said, report = choice.get("delta") or choice.get("message") or {}, choice.get("logprobs")
        text = said.get("content") or ""
        if said.get("reasoning_content") or said.get("reasoning") or said.get("tool_calls"):
            raise RequestRejected("the server reasons or calls tools, which nobody verifies", hint="turn that off on the server")
        told = [] if report is None else chat_positions(report)
        if any(position.token.data is None and position.token.id is None for position in told):
            self._lookahead = LOOKAHEAD
        return told, text

    async def _inspect(self) -> Capabilities:
        await self._named()
        asked = self.top_logprobs
        self.messages = PROBE
        try:
            warm, counted = await self._once(self._begun(())[1], temperature=2.0)
            first = await self.draft((), 8)
            notes = (CLOSED,) if self._tokens.vocabulary.closed else await self._look_closer(first, counted)
        finally:
            self.messages = ()
        if first.positions and not first.positions[-1].ids.size:
            notes = (*notes, "the token that ends an answer is not reported: its position is exact only where nothing is touched")
        return Capabilities(
            model=str(self.model),
            top_logprobs=self.top_logprobs,
            top_logprobs_cap=self.top_logprobs if self.top_logprobs < asked else None,
            processed=not alike(first.positions[0], warm),
            ids_in=False,
            ids_out=False,
            continues=self._prefill is not None,
            sampling=frozenset({"temperature", "top_p"}),
            context=self._context,
            notes=notes,
        )

    async def _look_closer(self, first: Draft, counted: int | None) -> tuple[str, ...]:
        """Find out how an answer is continued, and compare how both sides split text; returns notes for the capabilities."""
        prefill = await self._find_prefill(first)
        self.messages = ({"role": "user", "content": COMPARED},)
        _, compared = await self._once(self._begun(())[1])
        frame = None if counted is None or compared is None else counted - len(self._encoded(PROBE[0]["content"]))
        # A template may join the ends of a message with its own words.
        return prefill, self._compared(compared, len(self._encoded(COMPARED)) + (frame or 0), tolerance=2)

    async def _find_prefill(self, first: Draft) -> str:
        """Try how the server goes on from the beginning of its own answer: the next position must be reported as before.

        Returns a note for the capabilities.
        """
        if not first.tokens or not first.positions[0].ids.size:
            raise MalformedAnswer("the server answered the first question with nothing")
        cuts = [cut for cut in range(1, len(first.tokens)) if first.positions[cut].ids.size and self._text(first.tokens[:cut])]
        if not cuts:
            return "the first answer gave no text to try a continuation with, so that none is relied on: " + NO_PREFILL
        text = str(self._text(first.tokens[: cuts[-1]]))
        for self._prefill in PREFILLS:
            try:
                there, counted = await self._once(self._begun_by(text))
            except RequestRejected:
                continue
            if alike(there, first.positions[cuts[-1]]):
                self._keeps_space = await self._counts_space(text, counted)
                return f"an answer is continued by a message ({self._prefill})"
        self._prefill = None
        return NO_PREFILL

    async def _counts_space(self, text: str, counted: int | None) -> bool:
        """Whether white space around a begun answer reaches the model: only then does the server count it."""
        spaced = f"\n\n{text}\n\n"
        _, more = await self._once(self._begun_by(spaced))
        return counted is not None and more is not None and more - counted == len(self._encoded(spaced)) - len(self._encoded(text))
