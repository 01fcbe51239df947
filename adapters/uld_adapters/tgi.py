"""Text Generation Inference: text in, ids out, log-probabilities after sampling's own processing."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.errors import (
    BackendError,
    LogprobsUnavailable,
    MalformedAnswer,
    ModelNotFound,
    RequestRejected,
    ServerBusy,
    StreamInterrupted,
    TokenizerMismatch,
)
from uld_adapters.logprobs import Draft, TopLogprobs
from uld_adapters.served import GREEDY
from uld_adapters.served_text import TextServedBackend
from uld_adapters.vocabulary.fingerprint import CORPUS

_STREAM_ERRORS: dict[str, type[BackendError]] = {"overloaded": ServerBusy, "validation": RequestRejected}


class TGIBackend(TextServedBackend):
    """A TGI server, continued by text."""

    name = "tgi"
    logprobs_hint = "start TGI with --max-top-n-tokens 20"

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """One `/generate_stream` request; the server's own index proves that no event was lost or doubled."""
        start, text = self._sendable(prefix)
        again = list(prefix[start:])
        parameters: dict[str, Any] = {
            "max_new_tokens": n + len(again),
            "top_n_tokens": self.top_logprobs,
            "details": True,
            "return_full_text": False,
            "do_sample": not sampling.greedy,
        }
        if not sampling.greedy:
            # TGI takes no temperature of 1 apart from leaving it out, and no top_p of 1.
            chosen = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            parameters |= {name: value for name, value in chosen.items() if value is not None and not (name == "top_p" and value >= 1.0)}
        index = 0
        seen: list[int] = []
        done = False
        async for event in self.http.events("/generate_stream", {"inputs": text, "parameters": parameters}):
            if "error" in event:
                kind = _STREAM_ERRORS.get(str(event.get("error_type")), StreamInterrupted)
                raise kind(f"TGI broke off: {event['error']}")
            token, top, index = self._read(event, index, sampling)
            seen.append(token)
            details = event.get("details")
            finish = None
            if details is not None:
                self._check_details(details, start, len(seen))
                finish = self.finish_reason(details.get("finish_reason") == "eos_token", seen)
                done = True
            if len(seen) <= len(again):
                self.check_repeated(token, again[len(seen) - 1])
                continue
            yield Draft((token,), (top,), finish)
        if not done:
            raise StreamInterrupted("TGI's answer ended before its last event")

    def _read(self, event: dict[str, Any], index: int, sampling: ServerSampling) -> tuple[int, TopLogprobs, int]:
        try:
            token = int(event["token"]["id"])
            number = int(event["index"])
            if number != index + 1:
                raise MalformedAnswer("an event of TGI's stream was lost or came twice")
            tops = event.get("top_tokens")
            if not tops:
                raise LogprobsUnavailable("TGI sent a token without its top tokens", hint=self.logprobs_hint)
            pairs = [(int(t["id"]), float(t["logprob"])) for t in tops if t["logprob"] is not None]
            if event["token"]["logprob"] is None:
                raise MalformedAnswer("TGI gave no log-probability for the token it wrote")
            if all(t != token for t, _ in pairs):
                pairs.append((token, float(event["token"]["logprob"])))
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedAnswer(f"TGI's event lacks a field: {error!r}") from error
        top = TopLogprobs.build([t for t, _ in pairs], [v for _, v in pairs])
        return token, self.read_position(token, top, sampling, wanted=None if sampling.greedy else 1), number

    def _check_details(self, details: dict[str, Any], start: int, written: int) -> None:
        if details.get("input_length", start) != start:
            raise TokenizerMismatch(
                f"TGI split the prompt into {details['input_length']} tokens, the tokenizer into {start}",
                hint="pass tokenizer=... of the served model",
            )
        if details.get("generated_tokens", written) != written:
            raise MalformedAnswer(f"TGI wrote {details['generated_tokens']} tokens, {written} arrived")

    async def _raw_ids(self, text: str) -> list[int] | None:
        try:
            answer = await self.http.request("POST", "/tokenize", {"inputs": text})
        except ModelNotFound:
            return None
        return [int(token["id"]) for token in answer]

    async def _tokenize(self, text: str) -> list[int] | None:
        ids = await self._raw_ids(text)
        return ids[1:] if ids and ids[0] == self._server_bos else ids

    async def _find_bos(self) -> None:
        """TGI adds what the served tokenizer adds in front; learn it once, so that it is counted once."""
        ids = await self._raw_ids(CORPUS[0])
        bos = self.tokenizer.bos_token_id
        plain = self.tokenizer.encode(CORPUS[0], add_special_tokens=False)
        added = ids[0] if ids else next(iter(self.tokenizer.encode(CORPUS[0])), None)
        if added is not None and added == bos and plain[:1] != [bos]:
            self._server_bos = bos

    async def _inspect(self) -> Capabilities:
        info = await self.http.request("GET", "/info")
        await self._find_bos()
        notes = await self._check_tokenizer()
        head = [] if self._server_bos is None else [self._server_bos]
        cap = await self._probe_top([*head, *self.tokenizer.encode("The", add_special_tokens=False)])
        return Capabilities(
            model=str(info.get("model_id", self.model)),
            top_logprobs=self.top_logprobs,
            top_logprobs_cap=cap,
            processed=True,
            ids_in=False,
            sampling=frozenset({"temperature", "top_k", "top_p"}),
            context=info.get("max_total_tokens"),
            notes=notes,
        )
