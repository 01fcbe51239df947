"""`uld-sdk inspect`: what a server can do, what an artifact is, and whether the two fit."""

from dataclasses import asdict, replace
from typing import Any

import typer

from uld_adapters.errors import ArtifactError, TokenizerMismatch, UsageError
from uld_sdk.cli.options import ClientOptions, Json, spread
from uld_sdk.cli.output import facts, print_json, stdout, working

WORDS = {
    "top_logprobs": "log-probabilities a token",
    "top_logprobs_cap": "the server's cap on them",
    "processed": "they come after temperature and cuts",
    "ids_in": "takes token ids",
    "ids_out": "tells token ids",
    "continues": "goes on from a given answer",
    "scoring": "scores a given text by",
    "sampling": "samples with",
    "exclusive": "of these only one at a time",
    "context": "context in tokens",
}


@spread
def inspect(client: ClientOptions, as_json: Json = False) -> None:
    """Probe a server and show its caps; with --assistant say whether the artifacts fit. Exit code 1 when one does not."""
    if client.backend is None and not client.assistant:
        raise UsageError("nothing to inspect", hint="name a server (--backend tgi --base-url ...), an artifact (--assistant), or both")
    found: dict[str, Any] = {}
    told = [manifest_facts(str(folder)) for folder in client.assistant or []]
    if told:
        found |= {"assistant": told[0]} if len(told) == 1 else {"assistants": told}
    if client.backend is not None:
        with working("probing the server"):
            found["server"] = server_facts(client)
    if told:
        with working("loading the assistant"):
            found["fits"], found["reason"] = fits(client)
    if as_json:
        print_json(found)
    else:
        if "server" in found:
            stdout().print(facts("server", {WORDS.get(name, name): value for name, value in found["server"].items()}))
        for each in told:
            stdout().print(facts("assistant", each))
        if "fits" in found:
            print(verdict(client, len(told)) if found["fits"] else f"it does not fit: {found['reason']}")
    if not found.get("fits", True):
        raise typer.Exit(1)


def verdict(client: ClientOptions, count: int) -> str:
    """What is said of artifacts that fit."""
    if client.backend:
        return "the assistant fits the server" if count == 1 else "the assistants fit the server"
    return (
        "the assistant is complete, and its base model is the right one"
        if count == 1
        else "the assistants are complete, and so are their bases"
    )


def manifest_facts(path: str) -> dict[str, Any]:
    """What the manifest of an artifact says."""
    from uld_offset_models.manifest import read_manifest

    manifest = read_manifest(path).model_dump(mode="json")
    shown = ("method", "preset", "alpha", "margin", "filter", "tail", "gate", "assistant_parameters", "trainable_parameters", "steps")
    pair = manifest["pair"] or {}
    return {
        "path": path,
        "base": manifest["base"]["id"],
        "layers": manifest["base"]["layers"],
        **{name: manifest[name] for name in shown},
        **{f"trained_{name}": value for name, value in pair.items() if name != "whole"},
        "training_seconds": manifest["training_seconds"],
        "calibrated": None if manifest["calibration"] is None else manifest["calibration"]["rule"],
        "created": manifest["created"],
    }


def server_facts(client: ClientOptions) -> dict[str, Any]:
    """What the server was found to do; raises when it cannot be used at all."""
    lender = str(client.assistant[0]) if client.assistant else None
    plain = replace(client, assistant=None, assistant_base=None, tokenizer=client.tokenizer or lender)
    with plain.open() as opened:
        capabilities = opened.capabilities
    return {name: sorted(value) if isinstance(value, frozenset | tuple) else value for name, value in asdict(capabilities).items()}


def fits(client: ClientOptions) -> tuple[bool, str]:
    """Whether the assistants load, and speak the server's tokens; else why not."""
    try:
        if client.backend is None:
            from uld_offset_models.loading import load_artifact
            from uld_sdk.options import Connection

            said = Connection(assistant=client.assistant, assistant_base=client.base)
            for folder, base in zip(said.assistants, said.bases, strict=True):
                load_artifact(folder, base=None if base is None else str(base))
        else:
            with client.open() as opened:
                _ = opened.capabilities
    except (ArtifactError, TokenizerMismatch) as error:
        return False, str(error)
    return True, ""
