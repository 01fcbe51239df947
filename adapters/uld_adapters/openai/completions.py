"""`/v1/completions`: a prompt as ids or text, tokens as strings."""

from collections.abc import Sequence
from typing import Any

from uld_adapters.backend import Capabilities
from uld_adapters.errors import RequestRejected, ServerBusy
from uld_adapters.openai.names import Told, chat_positions, completion_positions
from uld_adapters.openai.places import RULES, Passage, Rule, origins
from uld_adapters.openai.server import COMPARED, LOOKAHEAD, OpenAIServer, alike


class CompletionsBackend(OpenAIServer):
    """A server of the OpenAI kind, continued by ids where it takes them, else by text."""

    _route = "/completions"
    _lookahead = LOOKAHEAD  # strings do not tell half a character's bytes
    _takes_ids = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # By the kind of prompt, how the server may count the places of its tokens.
        self._rules: dict[type, frozenset[Rule]] = {str: RULES, list: RULES}

    def resume(self, prefix: Sequence[int]) -> Sequence[int] | None:
        """The prefix itself where the server takes ids, else the ids that it will see for its text."""
        return prefix if self._takes_ids else super().resume(prefix)

    def _begun(self, prefix: Sequence[int]) -> tuple[int, dict[str, Any]]:
        if self._takes_ids:
            return len(prefix), {"prompt": list(prefix)}
        start, text = self._sendable(prefix)
        return start, {"prompt": text}

    def _asked(self) -> dict[str, Any]:
        return {"logprobs": self.top_logprobs}

    def _opened(self, begun: dict[str, Any]) -> Passage:
        prompt = begun["prompt"]
        text = prompt if isinstance(prompt, str) else self._decoded(prompt)
        return Passage(self._rules[type(prompt)], origins(prompt, text))

    def _learn(self, begun: dict[str, Any], opened: Passage) -> None:
        self._rules[type(begun["prompt"])] = opened.rules

    def _told(self, choice: dict[str, Any], opened: Passage) -> tuple[list[Told], str]:
        text, report = choice.get("text") or "", choice.get("logprobs")
        if report is not None and "content" in report:  # llama.cpp tells them as in a chat
            return chat_positions(report), text
        told, names, places = ([], [], []) if report is None else completion_positions(report)
        opened.follow(names, places, text)
        return told, text

    async def _inspect(self) -> Capabilities:
        await self._named()
        asked = self.top_logprobs
        ids = self._encoded(COMPARED)
        by_text, counted = await self._once({"prompt": COMPARED})
        bos = self.tokenizer.bos_token_id
        added = counted == len(ids) + 1 if counted is not None else self.tokenizer.encode(COMPARED)[:1] == [bos]
        if bos is not None and added:
            self._server_bos, ids = bos, [bos, *ids]
        notes = (self._compared(counted, len(ids)),)
        warm, _ = await self._once({"prompt": COMPARED}, temperature=2.0)
        try:
            by_ids, _ = await self._once({"prompt": ids})
            self._takes_ids = alike(by_text, by_ids)
        except RequestRejected:
            pass
        except ServerBusy as error:  # llama-cpp-python's word for a prompt of another type
            if error.status != 500 or "prompt" not in error.message:
                raise
        return Capabilities(
            model=str(self.model),
            top_logprobs=self.top_logprobs,
            top_logprobs_cap=self.top_logprobs if self.top_logprobs < asked else None,
            processed=not alike(by_text, warm),
            ids_in=self._takes_ids,
            ids_out=False,
            sampling=frozenset({"temperature", "top_p"}),
            context=self._context,
            notes=notes,
        )
