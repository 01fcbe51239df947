"""`/v1/completions`: a prompt as ids or text, tokens as strings, given text scored by an echo where the server has it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities
from uld_adapters.errors import LogprobsUnavailable, MalformedAnswer, RequestRejected, ServerBusy, TokenizerMismatch
from uld_adapters.logprobs import Score, TopLogprobs
from uld_adapters.openai.echo import read_echo
from uld_adapters.openai.names import Told, chat_positions, completion_positions
from uld_adapters.openai.places import RULES, Passage, Rule, origins
from uld_adapters.openai.server import COMPARED, LOOKAHEAD, OpenAIServer, alike
from uld_adapters.served import GREEDY


class CompletionsBackend(OpenAIServer):
    """A server of the OpenAI kind, continued by ids where it takes them, else by text."""

    _route = "/completions"
    _lookahead = LOOKAHEAD  # strings do not tell half a character's bytes
    _takes_ids = False
    _echoes = False

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

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """Log p_M of given tokens: in one request where the server echoes what it was sent, else out of drafts."""
        whole = [*prefix, *continuation]
        begun = self._all_of(whole) if self._echoes else None
        positions = [] if begun is None else (await self._echo(begun, whole))[len(prefix) :]
        told = [top for top in positions if top is not None]
        if begun is None or len(told) < len(positions):
            return await super().score(prefix, continuation)
        for top in told:
            self.check_report(top, 1)
        values = [top.of(token) for token, top in zip(continuation, told, strict=True)]
        logprobs = np.array([np.nan if value is None else value for value in values])
        return Score(tuple(continuation), logprobs, tuple(top.first(self.top_logprobs) for top in told))

    def _all_of(self, ids: Sequence[int]) -> dict[str, Any] | None:
        """The prompt that the server sees as all of these ids, None when there is none."""
        start, begun = self._begun(ids)
        return begun if start == len(ids) else None

    async def _echo(self, begun: dict[str, Any], ids: Sequence[int]) -> list[TopLogprobs | None]:
        answer = await self.http.request("POST", self._path, self._body(begun, 1, GREEDY) | {"echo": True})
        try:
            report = answer["choices"][0]["logprobs"]
        except (KeyError, TypeError, IndexError) as error:
            raise MalformedAnswer(f"the server's echo lacks a field: {error!r}") from error
        return read_echo(report, ids, self._tokens, wanted=self.top_logprobs, added=not self._takes_ids and self._server_bos is not None)

    async def _finds_echo(self, ids: Sequence[int]) -> bool:
        """Try an echo, and compare one of its positions with what the server reports where it writes itself."""
        begun = self._all_of(ids)
        if begun is None:
            return False
        try:
            positions = await self._echo(begun, ids)
        except (RequestRejected, MalformedAnswer, LogprobsUnavailable, TokenizerMismatch):
            return False
        except ServerBusy as error:
            if error.status != 500 or "echo" not in error.message:
                raise
            return False
        start, before = self._begun(ids[:-1])
        there, _ = await self._once(before)
        echoed = positions[start]
        return echoed is not None and alike(echoed, there)

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
        self._echoes = await self._finds_echo(ids)
        return Capabilities(
            model=str(self.model),
            top_logprobs=self.top_logprobs,
            top_logprobs_cap=self.top_logprobs if self.top_logprobs < asked else None,
            processed=not alike(by_text, warm),
            ids_in=self._takes_ids,
            ids_out=False,
            scoring="prompt" if self._echoes else "drafts",
            sampling=frozenset({"temperature", "top_p"}),
            context=self._context,
            notes=notes,
        )
