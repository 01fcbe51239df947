"""Options that several commands share, as dataclasses which `spread` lays out into a command's signature."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from uld_adapters.errors import UsageError

if TYPE_CHECKING:
    from uld_sdk.client import UnlearnedClient

SERVER = "Server"
UNLEARNING = "Unlearning"
SAMPLING = "Sampling"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


@dataclass(frozen=True)
class ServerOptions:
    """How to reach the large model."""

    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "-b", envvar="ULD_BACKEND", help="hf, tgi, vllm, llamacpp, openai, or an installed one.", rich_help_panel=SERVER
        ),
    ] = None
    base_url: Annotated[
        str | None, typer.Option("--base-url", "-u", envvar="ULD_BASE_URL", help="Address of the server.", rich_help_panel=SERVER)
    ] = None
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Name of the model on the server; with hf its folder or hub name.", rich_help_panel=SERVER),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="The large model's tokenizer: folder, GGUF or tiktoken file, hub name.", rich_help_panel=SERVER),
    ] = None
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="ULD_API_KEY", show_envvar=True, help="Key of the server.", rich_help_panel=SERVER)
    ] = None
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.001, help="Seconds without an answer.", rich_help_panel=SERVER)] = None
    max_retries: Annotated[
        int | None, typer.Option("--max-retries", min=0, help="Tries after the first one that failed.", rich_help_panel=SERVER)
    ] = None
    top_logprobs: Annotated[
        int | None,
        typer.Option("--top-logprobs", min=1, help="Log-probabilities a token; else 20, or the server's cap.", rich_help_panel=SERVER),
    ] = None
    target_device: Annotated[
        str | None, typer.Option("--target-device", help="With hf: where the large model runs: cpu, cuda, auto.", rich_help_panel=SERVER)
    ] = None
    target_dtype: Annotated[
        str | None, typer.Option("--target-dtype", help="With hf: float32, bfloat16 or float16.", rich_help_panel=SERVER)
    ] = None
    route: Annotated[
        str | None, typer.Option("--route", help="With openai: chat (the default), or completions.", rich_help_panel=SERVER)
    ] = None

    def chosen(self) -> dict[str, Any]:
        """The options that were given, named as the client's arguments."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def named(self) -> None:
        """Raise `UsageError` where no backend is named."""
        if self.backend is None:
            raise UsageError("no backend was named", hint="--backend tgi, vllm, llamacpp, openai or hf (or set ULD_BACKEND)")


@dataclass(frozen=True)
class ClientOptions(ServerOptions):
    """How to reach the large model, and with which assistants."""

    assistant: Annotated[
        list[Path] | None,
        typer.Option(
            "--assistant", "-a", envvar="ULD_ASSISTANT", help="Folder that `uld-sdk train` made; repeatable.", rich_help_panel=UNLEARNING
        ),
    ] = None
    assistant_base: Annotated[
        list[str] | None,
        typer.Option("--assistant-base", help="Where its base model lies now: one for all, or one each.", rich_help_panel=UNLEARNING),
    ] = None
    alpha: Annotated[float | None, typer.Option("--alpha", help="Strength of the correction.", rich_help_panel=UNLEARNING)] = None
    margin: Annotated[
        float | None, typer.Option("--margin", min=0.0, help="Dead zone in nats; 0 turns it off.", rich_help_panel=UNLEARNING)
    ] = None
    filter: Annotated[
        float | None,
        typer.Option("--filter", help="Least share of the top probability for a candidate; 0: off.", rich_help_panel=UNLEARNING),
    ] = None
    alignment: Annotated[
        str | None,
        typer.Option("--alignment", help="auto, bridge, bridge-exact or path: how tokens are compared.", rich_help_panel=UNLEARNING),
    ] = None
    tail: Annotated[
        str | None,
        typer.Option("--tail", help="Of a pair: truncate what is not reported, or complete it.", rich_help_panel=UNLEARNING),
    ] = None
    on_touched: Annotated[
        str | None, typer.Option("--on-touched", help="rewrite, or refuse at the first touched token.", rich_help_panel=UNLEARNING)
    ] = None
    refusal: Annotated[str | None, typer.Option("--refusal", help="What a refusal says.", rich_help_panel=UNLEARNING)] = None
    draft: Annotated[
        str | None, typer.Option("--draft", help="stream, auto, or a number of tokens a request.", rich_help_panel=UNLEARNING)
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", help="Where the assistant runs: cpu, cuda, auto.", rich_help_panel=UNLEARNING)
    ] = None

    @property
    def live(self) -> bool:
        """Whether text may be shown as it arrives: an answer that may end in a refusal must not be half told before."""
        return self.on_touched != "refuse"

    def chosen(self) -> dict[str, Any]:
        """The options that were given, named as the client's arguments."""
        given = {name: value for name, value in super().chosen().items() if value != []}
        if self.base is not None:
            given["assistant_base"] = self.base
        if self.draft is not None and self.draft.isdecimal():
            given["draft"] = int(self.draft)
        return given

    @property
    def base(self) -> str | list[str] | None:
        """Where the assistants' bases lie now: one place for all, or one each."""
        places = self.assistant_base or []
        return places if len(places) > 1 else next(iter(places), None)

    def open(self, **more: Any) -> "UnlearnedClient":
        """Make the client; raises UsageError when no backend is named."""
        self.named()
        from uld_sdk.client import UnlearnedClient

        return UnlearnedClient(**self.chosen(), **more)


@dataclass(frozen=True)
class SamplingOptions:
    """How the answer is drawn; temperature 0 is greedy."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.", rich_help_panel=SAMPLING)] = 256
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the most probable token.", rich_help_panel=SAMPLING)
    ] = 0.0
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw among the k most probable.", rich_help_panel=SAMPLING)] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Draw within this probability mass.", rich_help_panel=SAMPLING)
    ] = None
    min_p: Annotated[
        float | None, typer.Option("--min-p", min=0.0, max=1.0, help="Least share of the top probability.", rich_help_panel=SAMPLING)
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", help="From 0 to 2**63 - 1; the same seed, the same text.", rich_help_panel=SAMPLING)
    ] = None
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.", rich_help_panel=SAMPLING)] = None

    def chosen(self) -> dict[str, Any]:
        """The options that were given, named as the arguments of `generate`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None and value != []}


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a dataclass type by one keyword parameter a field, so that typer shows every field as an option."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
            continue
        group = groups[parameter.name]
        kinds = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[field.name]))

    @wraps(command)
    def run(**values: Any) -> None:
        packed = {name: group(**{field.name: values.pop(field.name) for field in fields(group)}) for name, group in groups.items()}
        command(**packed, **values)

    run.__dict__.pop("__wrapped__")
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
