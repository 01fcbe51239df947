"""What callers may say: the options of a client and of a call, with their defaults, units and limits.

Each set stands here twice: as a TypedDict, from which type checkers know the keywords of the clients' methods, and as the frozen
dataclass behind it, which holds defaults and refuses what cannot be. A test holds the two together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from uld_adapters.backend import Backend
from uld_adapters.errors import UsageError
from uld_sdk.checks import check_flag, check_number, check_text, check_whole, paths_of
from uld_sdk.text import stop_strings

REFUSAL = "I'm sorry, but I can't help with that."
LARGEST_SEED = 2**63 - 1
_SERVED = ("tgi", "vllm", "llamacpp", "openai")


class GenerationKeywords(TypedDict, total=False):
    """Keywords of `generate`, `chat`, `stream` and `generate_many`; see `Generation`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    raw: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Options of one answer.

    max_new_tokens: the longest answer, in tokens (256).
    temperature: 0 takes the most probable token at every position (0).
    top_k: draw among the k most probable tokens (None: off).
    top_p: draw within this probability mass, in (0, 1] (None: off).
    min_p: least share of the top probability that a drawn token needs, in [0, 1] (None: off).
    seed: from 0 to 2**63 - 1, makes sampling reproducible (match mode); None leaves drawing to the server (pass-through).
    stop: one or several texts before which the answer ends (None).
    raw: go on from the prompt's text as it is, without a chat template (False).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        for name, optional in (("max_new_tokens", False), ("top_k", True), ("seed", True)):
            check_whole(self, name, optional=optional)
        for name, optional in (("temperature", False), ("top_p", True), ("min_p", True)):
            check_number(self, name, optional=optional)
        check_flag(self, "raw")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", hint="ask for at least one token")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise UsageError(f"seed is {self.seed}", hint="give a whole number from 0 to 2**63 - 1")
        if not isinstance(self.stop, str | Sequence | None) or isinstance(self.stop, bytes):
            raise UsageError(f"stop is {self.stop!r}", hint='pass a text or a list of texts, as in stop=["\\n\\n"]')
        _ = self.stops

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple; raises `UsageError` for an empty one."""
        return stop_strings(self.stop)


class ScoreKeywords(TypedDict, total=False):
    """Keywords of `score`; see `Scoring`."""

    raw: bool


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Options of a score.

    raw: the continuation follows the prompt's text as it is, without a chat template (False).
    """

    raw: bool = False

    def __post_init__(self) -> None:
        check_flag(self, "raw")


class ConnectionKeywords(TypedDict, total=False):
    """Keywords of `UnlearnedClient` and `AsyncUnlearnedClient`; see `Connection`."""

    backend: str | Backend
    base_url: str | None
    assistant: str | Path | Sequence[str | Path] | None
    model: Any
    tokenizer: Any
    assistant_base: str | Path | Sequence[str | Path | None] | None
    api_key: str | None
    timeout: float
    max_retries: int
    http_client: Any
    top_logprobs: int | None
    alpha: float | None
    margin: float | None
    filter: float | None
    tail: Literal["truncate", "complete"] | None
    alignment: Literal["auto", "bridge", "bridge-exact", "path"]
    on_touched: Literal["rewrite", "refuse"]
    refusal: str
    draft: str | int
    device: str
    target_device: str | None
    target_dtype: str | None
    route: Literal["chat", "completions"] | None
    trace: bool


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Options of a client.

    backend: tgi, vllm, llamacpp, openai, hf (a transformers model in this process), an installed name, or a Backend ("vllm").
    base_url: address of the server, with or without /v1; with openai as the official client takes it (None).
    assistant: folder of a trained assistant, or of several, whose corrections add up; None shows the plain large model (None).
    model: name of the model on the server; with hf its folder, hub name, or a loaded model (None: the first that is served).
    tokenizer: the large model's: folder, GGUF file, hub name or object (None: with hf the model's, else the assistant's).
    assistant_base: where the assistant's base model lies now, of several one place for all or one each (None: where it lay in training).
    api_key: key of the server (None).
    timeout: seconds that a server may be silent (60).
    max_retries: tries after the first one that failed (4).
    http_client: an `httpx2.AsyncClient` of your own, which stays open (None).
    top_logprobs: what to ask for at each position (None: 20, or the server's cap where that is lower; with hf all).
    alpha: strength of the correction, of every assistant (None: its own).
    margin: its dead zone in nats; 0 turns it off (None: its own).
    filter: least share of the top probability that a candidate needs, in [0, 1), 0 turns it off (None: its own).
    tail: what stands for tokens that are not reported: nothing ("truncate"), or the frozen model of a pair ("complete") (None: as trained).
    alignment: how the assistant's tokens are told in the large model's: "auto" (the same tokens, else "bridge"), "bridge-exact" (reads
      on until the bound is at most 0.01), or "path" (one spelling a token, approximate) ("auto").
    on_touched: "rewrite" the answer, or "refuse" it at the first position that the assistant touches ("rewrite").
    refusal: what a refusal says ("I'm sorry, but I can't help with that.").
    draft: "stream", "auto", or the number of tokens to ask for in a request ("stream").
    device: where the assistant runs: cpu, cuda, auto ("cpu").
    target_device: with hf, where the large model runs (None: cpu, or where a loaded model is).
    target_dtype: with hf, its precision: float32, bfloat16 or float16 (None: float32, or that of a loaded model).
    route: with openai, "chat" (messages, top 20) or "completions" (text or ids, top 5) (None: chat).
    trace: keep what happened at each token in `report.trace` (False).
    """

    backend: str | Backend = "vllm"
    base_url: str | None = None
    assistant: str | Path | Sequence[str | Path] | None = None
    model: Any = None
    tokenizer: Any = None
    assistant_base: str | Path | Sequence[str | Path | None] | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    max_retries: int = 4
    http_client: Any = None
    top_logprobs: int | None = None
    alpha: float | None = None
    margin: float | None = None
    filter: float | None = None
    tail: Literal["truncate", "complete"] | None = None
    alignment: Literal["auto", "bridge", "bridge-exact", "path"] = "auto"
    on_touched: Literal["rewrite", "refuse"] = "rewrite"
    refusal: str = REFUSAL
    draft: str | int = "stream"
    device: str = "cpu"
    target_device: str | None = None
    target_dtype: str | None = None
    route: Literal["chat", "completions"] | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        # Not isinstance(..., Backend): on Python 3.11 that would load the tokenizer.
        if not isinstance(self.backend, str) and not callable(getattr(self.backend, "probe", None)):
            raise UsageError(f"backend is {self.backend!r}", hint="pass a name such as tgi, vllm, llamacpp, openai or hf, or a Backend")
        for name in ("base_url", "api_key", "target_device", "target_dtype"):
            check_text(self, name, optional=True)
        for name in ("refusal", "device"):
            check_text(self, name)
        if len(self.bases) != len(self.assistants):
            raise UsageError(
                f"assistant_base names {len(self.bases)} places for {len(self.assistants)} assistants",
                hint="give one place for all, or one for each in their order (None: where it lay in training)",
            )
        for name, optional in (("max_retries", False), ("top_logprobs", True)):
            check_whole(self, name, optional=optional)
        for name, optional in (("timeout", False), ("alpha", True), ("margin", True), ("filter", True)):
            check_number(self, name, optional=optional)
        check_flag(self, "trace")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError(
                "api_key holds characters that a header cannot carry", hint="use plain ASCII: no accents, no line break at its end"
            )
        if not self.timeout > 0:
            raise UsageError(f"timeout is {self.timeout}", hint="give seconds above 0")
        if self.max_retries < 0:
            raise UsageError(f"max_retries is {self.max_retries}", hint="give 0 or more")
        if self.top_logprobs is not None and self.top_logprobs < 1:
            raise UsageError(f"top_logprobs is {self.top_logprobs}", hint="ask for at least 1; 20 is usual")
        if self.alignment not in ("auto", "bridge", "bridge-exact", "path"):
            raise UsageError(f"alignment is {self.alignment!r}", hint='choose "auto", "bridge", "bridge-exact" or "path"')
        if self.tail not in (None, "truncate", "complete"):
            raise UsageError(f"tail is {self.tail!r}", hint='choose "truncate" or "complete"')
        if self.on_touched not in ("rewrite", "refuse"):
            raise UsageError(f"on_touched is {self.on_touched!r}", hint='choose "rewrite" or "refuse"')
        number = isinstance(self.draft, int) and not isinstance(self.draft, bool) and self.draft >= 1
        if not number and self.draft not in ("stream", "auto"):
            raise UsageError(f"draft is {self.draft!r}", hint='choose "stream", "auto" or a number of tokens')
        if (self.target_device or self.target_dtype) and (self.backend in _SERVED or not isinstance(self.backend, str)):
            raise UsageError("target_device and target_dtype are for a model in this process", hint='leave them out, or use backend="hf"')
        self._check_route()

    def _check_route(self) -> None:
        if self.route not in (None, "chat", "completions"):
            raise UsageError(f"route is {self.route!r}", hint='choose "chat" or "completions"')
        other = self.backend in ("hf", *_SERVED) and self.backend != "openai"
        if self.route is not None and (other or not isinstance(self.backend, str)):
            raise UsageError("route is for servers of the OpenAI kind", hint='leave it out, or use backend="openai"')

    @property
    def assistants(self) -> tuple[str | Path, ...]:
        """The folders of the assistants; raises `UsageError` for what is none."""
        return tuple(folder for folder in paths_of(self, "assistant") if folder is not None)

    @property
    def bases(self) -> tuple[str | Path | None, ...]:
        """Where the base of each assistant lies now; raises `UsageError`."""
        found = paths_of(self, "assistant_base", inside=True)
        return found if isinstance(self.assistant_base, list | tuple) else (found or (None,)) * len(self.assistants)
