"""llama.cpp's own `/completion`: ids in, ids out, raw log-probabilities of any k."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.errors import LogprobsUnavailable, MalformedAnswer, ModelNotFound, StreamInterrupted, TokenizerMismatch
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs
from uld_adapters.served import GREEDY, ServedBackend
from uld_adapters.vocabulary.by_bytes import TokensByBytes
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_adapters.vocabulary.words import ends_inside_character

CHUNK = 32  # positions that one request asks for
BIAS = 1000.0  # added to a logit so that this token is written whatever the model thinks; the reported values stay raw


class LlamaCppBackend(ServedBackend):
    """A llama.cpp server.

    A token that leaves a character incomplete comes with no entry in the stream; its position is asked for again, with a
    bias that makes the server write a plain token there and report the raw top k.
    """

    name = "llamacpp"
    logprobs_hint = "use llama-server's native /completion route with n_probs"
    _slots: asyncio.Queue[int] | None = None

    def _body(self, prefix: Sequence[int], n: int, sampling: ServerSampling) -> dict[str, Any]:
        return {
            "prompt": list(prefix),
            "n_predict": n,
            "n_probs": self.top_logprobs,
            "return_tokens": True,
            "cache_prompt": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p or 0.0,
            "repeat_penalty": 1.0,
            "samplers": ["temperature", "top_k", "top_p", "min_p"],
        }

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """One completion request; the server's count of tokens shows where entries are missing, lost or doubled."""
        _ = self.tokenizer
        seen: list[int] = []
        stopped: bool | None = None
        async for event in self.http.events("/completion", {**self._body(prefix, n, sampling), "stream": True}):
            if "error" in event:
                raise StreamInterrupted(f"llama.cpp broke off: {event['error']}")
            try:
                entries = [(int(e["id"]), e) for e in event.get("completion_probabilities") or []]
                tokens, counted = list(event["tokens"]), int(event["tokens_predicted"])
                if event["stop"]:
                    stopped = event["stop_type"] in ("eos", "word")
                    if event.get("truncated"):
                        raise MalformedAnswer("llama.cpp cut the prompt", hint="raise the server's context (-c)")
            except (KeyError, TypeError, ValueError) as error:
                raise MalformedAnswer(f"llama.cpp's event lacks a field: {error!r}") from error
            if tokens and not entries:
                raise LogprobsUnavailable("llama.cpp sent a token without log-probabilities", hint=self.logprobs_hint)
            if tokens != [token for token, _ in entries]:
                raise MalformedAnswer("llama.cpp's tokens and log-probabilities do not belong together")
            missing = counted - len(seen) - len(tokens)
            if missing < 0 or (missing and event["stop"] and stopped):
                raise MalformedAnswer("an event of llama.cpp's stream was lost or came twice")
            if missing:
                text = self._entry_bytes(entries[0][1]) if entries else None
                hidden = await self._ask_again([*prefix, *seen], missing, text, tokens[:1], sampling)
                seen.extend(hidden.tokens)
                yield hidden
            if tokens:
                positions = tuple(self.read_position(token, self._read(entry), sampling) for token, entry in entries)
                seen.extend(tokens)
                yield Draft(tuple(tokens), positions)
            if stopped is not None:
                yield Draft((), (), self.finish_reason(stopped, seen))
                return
        raise StreamInterrupted("llama.cpp's answer ended before its last event")

    def _read(self, entry: dict[str, Any]) -> TopLogprobs:
        try:
            return TopLogprobs.build([int(t["id"]) for t in entry["top_logprobs"]], [float(t["logprob"]) for t in entry["top_logprobs"]])
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedAnswer(f"llama.cpp's log-probabilities lack a field: {error!r}") from error

    def _entry_bytes(self, entry: dict[str, Any]) -> bytes:
        try:
            return bytes(entry["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedAnswer(f"llama.cpp's entry lacks its bytes: {error!r}") from error

    @cached_property
    def _tokens(self) -> TokensByBytes:
        return TokensByBytes(Vocabulary.from_hf(self.tokenizer))

    async def _ask_again(self, prefix: list[int], count: int, text: bytes | None, last: list[int], sampling: ServerSampling) -> Draft:
        """The tokens that the stream left out, each position asked for by itself.

        Greedy: each is the most probable one. Sampled: they are the one way to write the completed character's bytes in
        `count` pieces that each stop inside it.
        """
        drawn: list[int] | None = None
        if not sampling.greedy:
            if text is None:
                raise StreamInterrupted("llama.cpp stopped inside a character")
            drawn = self._pieces(text[: len(text) - len(self._tokens.spelling(last[0]))], count)
        tokens: list[int] = []
        positions: list[TopLogprobs] = []
        for step in range(count):
            top = await self._position([*prefix, *tokens])
            tokens.append(int(top.ids[0]) if drawn is None else drawn[step])
            positions.append(top)
        spelled = b"".join(self._tokens.spelling(token) for token in [*tokens, *last])
        if text is not None and spelled != text:
            raise MalformedAnswer(f"the tokens that llama.cpp left out spell {spelled!r}, not {text!r}")
        return Draft(tuple(tokens), tuple(positions))

    def _pieces(self, data: bytes, count: int) -> list[int]:
        found, ways = self._tokens.only_split(data, count, lambda done, piece: ends_inside_character(done + piece))
        if found is None:
            number = "several" if ways else "no"
            raise StreamInterrupted(f"llama.cpp left out {count} tokens that spell {data!r}, in {number} possible ways")
        return found

    @cached_property
    def _plain_token(self) -> int:
        token = self._tokens.text(b"a")
        if token is None:
            raise TokenizerMismatch("the tokenizer has no token for the letter a", hint="pass tokenizer=... of the served model")
        return token

    async def _position(self, prefix: list[int]) -> TopLogprobs:
        """Raw top k at one position, whatever stands there."""
        (answer,) = await self._biased([prefix], self._plain_token)
        return self._top(answer)

    async def _biased(self, prefixes: list[list[int]], token: int, slot: int = -1) -> list[dict[str, Any]]:
        """One token after each prefix, in one request, under a bias that makes it this token and leaves the report raw."""
        one = {"prompt": prefixes[0] if len(prefixes) == 1 else prefixes, "logit_bias": [[token, BIAS]], "id_slot": slot}
        answer = await self.http.request("POST", "/completion", self._body(prefixes[0], 1, GREEDY) | one)
        answers = answer if isinstance(answer, list) else [answer]
        if [a.get("index") if isinstance(a, dict) else None for a in answers] != list(range(len(prefixes))):
            raise MalformedAnswer(f"llama.cpp answered {len(answers)} of {len(prefixes)} prompts, or in another order")
        return answers

    def _top(self, answer: dict[str, Any]) -> TopLogprobs:
        """Raw top k."""
        entries = answer.get("completion_probabilities")
        if not entries:
            raise LogprobsUnavailable("llama.cpp reports no log-probabilities", hint=self.logprobs_hint)
        top = self._read(entries[0])
        self.check_report(top, self.top_logprobs)
        return top

    def _written(self, answer: dict[str, Any], token: int) -> float:
        """The value of a token that a bias made the server write; NaN where it ends inside a character, which goes unreported."""
        entries = answer.get("completion_probabilities")
        if not entries:
            return float("nan")
        try:
            if int(entries[0]["id"]) != token:
                raise MalformedAnswer(f"llama.cpp wrote token {entries[0]['id']} under a bias towards {token}")
            return float(entries[0]["logprob"])
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedAnswer(f"llama.cpp's log-probabilities lack a field: {error!r}") from error

    @asynccontextmanager
    async def _slot(self) -> AsyncGenerator[int]:
        """One of the server's slots for one text: every request of the text goes on from what the slot has read before.

        Texts that take turns in a slot would make the server read them from their beginning again and again.
        """
        if self._slots is None:
            count = (await self.http.request("GET", "/props")).get("total_slots", 1)
            if self._slots is None:
                self._slots = asyncio.Queue()
                for slot in range(count):
                    self._slots.put_nowait(slot)
        slot = await self._slots.get()
        try:
            yield slot
        finally:
            self._slots.put_nowait(slot)

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """Log p_M of given tokens: the raw top k of many positions a request, and a request for each token outside of its top k.

        Both come under a bias that leaves the report raw. NaN where the token ends inside a character and lies outside of the top k.
        """
        _ = self.tokenizer
        positions: list[TopLogprobs] = []
        values: list[float | None] = []
        async with self._slot() as slot:
            for start in range(0, len(continuation), CHUNK):
                tokens = continuation[start : start + CHUNK]
                prefixes = [[*prefix, *continuation[: start + step]] for step in range(len(tokens))]
                tops = [self._top(answer) for answer in await self._biased(prefixes, self._plain_token, slot)]
                told = [top.of(token) for top, token in zip(tops, tokens, strict=True)]
                for step in reversed([step for step, value in enumerate(told) if value is None]):  # the slot forgets from the end
                    (answer,) = await self._biased([prefixes[step]], tokens[step], slot)
                    told[step] = self._written(answer, tokens[step])
                values.extend(told)
                positions.extend(top.first(self.top_logprobs) for top in tops)
        return Score(tuple(continuation), np.array(values, dtype=np.float64), tuple(positions))

    async def _tokenize(self, text: str) -> list[int] | None:
        body = {"content": text, "add_special": False, "parse_special": True}
        try:
            answer = await self.http.request("POST", "/tokenize", body)
        except ModelNotFound:
            return None
        return list(answer["tokens"])

    async def _inspect(self) -> Capabilities:
        props = await self.http.request("GET", "/props")
        notes = await self._check_tokenizer()
        if self.top_logprobs > len(self.tokenizer):
            self._cap_top(len(self.tokenizer), "the vocabulary has no more")
        draft = await self.draft(self.tokenizer.encode("The", add_special_tokens=False), 1)
        if draft.finish is None or draft.finish not in FinishReason:
            raise MalformedAnswer("llama.cpp did not end a one-token answer")
        return Capabilities(
            model=str(props.get("model_alias") or props.get("model_path")),
            top_logprobs=self.top_logprobs,
            scoring="forced",
            context=props.get("default_generation_settings", {}).get("n_ctx"),
            notes=notes,
        )
