"""`uld-sdk inspect`: what a server can do, what an artifact is, and whether the two fit."""

from dataclasses import asdict, replace
from typing import Any

import typer

from uld_adapters.errors import ArtifactError, TokenizerMismatch, UsageError
from uld_sdk.cli.options import ClientOptions, Json, spread
from uld_sdk.cli.output import facts, print_json, stdout, working


@spread
def inspect(client: ClientOptions, as_json: Json = False) -> None:
    """Probe a server and show its caps; with --assistant say whether the artifact fits. Exit code 1 when it does not."""
    if client.backend is None and client.assistant is None:
        raise UsageError("nothing to inspect", hint="name a server (--backend tgi --base-url ...), an artifact (--assistant), or both")
    found: dict[str, Any] = {}
    if client.assistant is not None:
        found["assistant"] = manifest_facts(client.assistant)
    if client.backend is not None:
        with working("probing the server"):
            found["server"] = server_facts(client)
    if client.assistant is not None:
        with working("loading the assistant"):
            found["fits"], found["reason"] = fits(client, client.assistant)
    if as_json:
        print_json(found)
    else:
        for title in ("server", "assistant"):
            if title in found:
                stdout().print(facts(title, found[title]))
        if "fits" in found:
            what = "the assistant fits the server" if client.backend else "the assistant is complete, and its base model is the right one"
            print(what if found["fits"] else f"it does not fit: {found['reason']}")
    if not found.get("fits", True):
        raise typer.Exit(1)


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
    plain = replace(client, assistant=None, assistant_base=None, tokenizer=client.tokenizer or client.assistant)
    with plain.open() as opened:
        capabilities = opened.capabilities
    return {name: sorted(value) if isinstance(value, frozenset | tuple) else value for name, value in asdict(capabilities).items()}


def fits(client: ClientOptions, assistant: str) -> tuple[bool, str]:
    """Whether the assistant loads, and speaks the server's tokens; else why not."""
    try:
        if client.backend is None:
            from uld_offset_models.artifact import load_artifact

            load_artifact(assistant, base=client.assistant_base)
        else:
            with client.open() as opened:
                _ = opened.capabilities
    except (ArtifactError, TokenizerMismatch) as error:
        return False, str(error)
    return True, ""
