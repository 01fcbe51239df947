"""vLLM's `/v1/completions`: ids in, ids out, raw log-probabilities."""

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.errors import LogprobsUnavailable, MalformedAnswer, ModelNotFound, StreamInterrupted
from uld_adapters.logprobs import MASKED, Draft, Score, TopLogprobs
from uld_adapters.served import GREEDY, ServedBackend

_TOKEN = re.compile(r"token_id:(\d+)\Z")
RAW_TOLERANCE = 0.05  # nats between two readings of one position; processed values differ by far more


def _token_id(text: Any) -> int:
    match = _TOKEN.match(text) if isinstance(text, str) else None
    if match is None:
        raise MalformedAnswer(f"vLLM named a token {text!r} where an id was asked for", hint="use vLLM 0.10 or newer")
    return int(match.group(1))


class VLLMBackend(ServedBackend):
    """A vLLM server. `model` defaults to the first that it serves."""

    name = "vllm"
    logprobs_hint = "start vLLM with --max-logprobs 20 (its default)"

    def _body(self, prefix: Sequence[int], n: int, sampling: ServerSampling) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prefix),
            "max_tokens": n,
            "logprobs": self.top_logprobs,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "temperature": sampling.temperature,
            # Said in full, for a served model's generation_config may set other defaults.
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """One completion request, its events as they arrive; text offsets prove that none was lost or doubled."""
        _ = self.tokenizer
        await self._named()
        seen: list[int] = []
        offset = 0
        finished = False
        body = {**self._body(prefix, n, sampling), "stream": True, "stream_options": {"include_usage": True}}
        async for event in self.http.events("/v1/completions", body):
            if "error" in event:
                raise StreamInterrupted(f"vLLM broke off: {event['error']}")
            if not event.get("choices"):
                self._check_usage(event.get("usage"), len(prefix), len(seen))
                continue
            choice = event["choices"][0]
            tokens, positions, offset = self._read(choice, offset, sampling)
            seen.extend(tokens)
            reason = choice.get("finish_reason")
            finished = finished or reason is not None
            finish = self.finish_reason(reason == "stop", seen) if reason else None
            if tokens or finish:
                yield Draft(tuple(tokens), tuple(positions), finish)
        if not finished:
            raise StreamInterrupted("vLLM's answer ended before its last event")

    def _read(self, choice: dict[str, Any], offset: int, sampling: ServerSampling) -> tuple[list[int], list[TopLogprobs], int]:
        logprobs = choice.get("logprobs")
        ids = choice.get("token_ids") or []
        if logprobs is None:
            if ids or choice.get("text"):
                raise LogprobsUnavailable("vLLM sent text without log-probabilities", hint=self.logprobs_hint)
            return [], [], offset
        try:
            names, tops, starts = logprobs["tokens"], logprobs["top_logprobs"], logprobs["text_offset"]
            tokens = [_token_id(name) for name in names]
            if (ids and tokens != ids) or not len(tokens) == len(tops) == len(starts):
                raise MalformedAnswer("vLLM's ids and log-probabilities do not belong together")
            positions = []
            for name, token, top, start in zip(names, tokens, tops, starts, strict=True):
                if start != offset:
                    raise MalformedAnswer("an event of vLLM's stream was lost or came twice")
                offset = start + len(name)
                pairs = [(_token_id(key), value) for key, value in top.items() if value is not None and value > MASKED]
                built = TopLogprobs.build([t for t, _ in pairs], [v for _, v in pairs])
                positions.append(self.read_position(token, built, sampling, wanted=None if sampling.greedy else 1))
        except (KeyError, TypeError, AttributeError) as error:
            raise MalformedAnswer(f"vLLM's log-probabilities lack a field: {error!r}") from error
        return tokens, positions, offset

    def _check_usage(self, usage: dict[str, int] | None, prompt: int, written: int) -> None:
        if usage and (usage.get("prompt_tokens"), usage.get("completion_tokens")) != (prompt, written):
            raise MalformedAnswer(
                f"vLLM counts {usage.get('prompt_tokens')} + {usage.get('completion_tokens')} tokens, {prompt} + {written} were seen"
            )

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """Log p_M of given tokens in one request, from prompt log-probabilities."""
        await self._named()
        body = self._body([*prefix, *continuation], 1, GREEDY) | {"prompt_logprobs": self.top_logprobs, "logprobs": None}
        answer = await self.http.request("POST", "/v1/completions", body)
        try:
            rows = answer["choices"][0]["prompt_logprobs"][len(prefix) :]
            if len(rows) != len(continuation):
                raise MalformedAnswer(f"vLLM scored {len(rows)} of {len(continuation)} tokens")
            positions = [TopLogprobs.build([int(i) for i in row], [cell["logprob"] for cell in row.values()]) for row in rows]
            values = [float(row[str(token)]["logprob"]) for row, token in zip(rows, continuation, strict=True)]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise MalformedAnswer(f"vLLM's prompt log-probabilities lack a field: {error!r}") from error
        for top in positions:
            self.check_report(top, self.top_logprobs)
        return Score(tuple(continuation), np.array(values), tuple(top.first(self.top_logprobs) for top in positions))

    async def _named(self) -> str:
        if self.model is None:
            self._first_model(await self.http.request("GET", "/v1/models"))
        return str(self.model)

    def _first_model(self, listing: dict[str, Any]) -> dict[str, Any]:
        served = {entry["id"]: entry for entry in listing["data"]}
        if self.model is None:
            self.model = next(iter(served), None)
        if self.model not in served:
            raise ModelNotFound(f"no model {self.model!r} at {self.http.base_url}", hint=f"it serves {', '.join(served) or 'none'}")
        entry: dict[str, Any] = served[self.model]
        return entry

    async def _tokenize(self, text: str) -> list[int] | None:
        try:
            answer = await self.http.request("POST", "/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        except ModelNotFound:
            return None
        return list(answer["tokens"])

    async def _inspect(self) -> Capabilities:
        entry = self._first_model(await self.http.request("GET", "/v1/models"))
        notes = await self._check_tokenizer()
        prefix = self.tokenizer.encode("The", add_special_tokens=False)
        cap = await self._probe_top(prefix)
        processed = await self._reports_processed(prefix)
        if processed:
            notes = (*notes, "log-probabilities come after temperature (--logprobs-mode): sampling re-asks touched positions")
        return Capabilities(
            model=str(self.model),
            top_logprobs=self.top_logprobs,
            top_logprobs_cap=cap,
            processed=processed,
            scoring="prompt",
            # With both, vLLM cuts by min_p first and by top_p after, transformers the other way round.
            sampling=frozenset({"temperature", "top_k", "top_p", "min_p"}),
            exclusive=frozenset({"top_p", "min_p"}),
            context=entry.get("max_model_len"),
            notes=notes,
        )

    async def _reports_processed(self, prefix: Sequence[int]) -> bool:
        """Whether a temperature moves the reported values: the server then runs in a processed --logprobs-mode."""
        plain, warm = [
            await self.http.request("POST", "/v1/completions", self._body(prefix, 1, replace(GREEDY, temperature=temperature)))
            for temperature in (0.0, 2.0)
        ]
        try:
            first, second = (dict(answer["choices"][0]["logprobs"]["top_logprobs"][0]) for answer in (plain, warm))
            return any(abs(first[token] - second[token]) > RAW_TOLERANCE for token in first.keys() & second.keys())
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LogprobsUnavailable("vLLM reports no log-probabilities", hint=self.logprobs_hint) from error
