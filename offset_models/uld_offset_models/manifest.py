"""`uld.json`: what an assistant is, how it was trained, the SHA-256 of every file beside it, and its own."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uld_adapters.errors import ArtifactCorrupt, ArtifactMismatch

MANIFEST = "uld.json"
DIRECT = "direct.json"  # beside weights that `--method direct` trained, which are no assistant
RETRAIN = "train the assistant again, or restore the folder from its backup"


class Frozen(BaseModel):
    """A piece of a manifest: immutable, and nothing in it that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseReference(Frozen):
    """The model that the adapter sits on: `id` as the user gave it, SHA-256 of its weights, layers kept."""

    id: str
    sha256: str
    layers: int = Field(ge=1)
    truncated: bool = False


class Calibration(Frozen):
    """How alpha, margin and filter were chosen: the rule in words and its thresholds, what was reached, and on what.

    `chosen` and `before` hold the three values, `reached` the shares and nats of the chosen point, `holdout` the SHA-256 of the rows
    by set and `rows` their numbers, `apart_from` the SHA-256 of sets that share no question with them; `target` is the large model as
    its server names it, `top_logprobs` the k in use (None: all).
    """

    rule: str
    thresholds: dict[str, float]
    chosen: dict[str, float]
    before: dict[str, float]
    reached: dict[str, float]
    holdout: dict[str, str]
    apart_from: list[str]
    rows: dict[str, int]
    target: str
    top_logprobs: int | None
    date: str


class PairReference(Frozen):
    """How a pair was trained: towards which objective, with which alpha and tail policy, on the word of which target.

    `trainable` is what training moved. With `whole` the folder holds all of o', else an adapter on the base o.
    """

    objective: str
    alpha: float = Field(gt=0)
    tail: Literal["truncate", "complete"]
    trainable: Literal["lora", "full", "p-adapter"]
    whole: bool
    target: str
    top_logprobs: int | None


class Manifest(Frozen):
    """`uld.json`. `margin` is in nats (0 = off), `data` maps a name to a hash of the rows, `files` a file to its SHA-256.
    `calibration` tells how alpha, margin and filter were chosen; None: with the training.

    `alpha`, `margin`, `filter` and `tail` are those of inference; `pair` is there for the method offset, and only there. `sha256` is that
    of all the rest in canonical JSON. It finds damage and edits by mistake; whoever edits on purpose can renew it.
    """

    format: Literal[1] = 1
    method: Literal["uld", "offset"] = "uld"
    preset: str
    base: BaseReference
    tokenizer_sha256: str
    chat_template: bool
    alpha: float = Field(gt=0)
    margin: float = Field(ge=0)
    filter: float = Field(ge=0, lt=1)
    tail: Literal["truncate", "complete"] = "truncate"
    gate: bool
    pair: PairReference | None = None
    dtype: str
    training: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    training_seconds: float
    losses: dict[str, float]
    steps: int
    assistant_parameters: int
    trainable_parameters: int
    files: dict[str, str] = Field(default_factory=dict)
    created: str
    calibration: Calibration | None = None
    sha256: str = ""

    @model_validator(mode="after")
    def _pairs_are_described(self) -> Self:
        if (self.method == "offset") != (self.pair is not None):
            raise ValueError("the method offset, and no other, comes with `pair`")
        return self

    @property
    def lora(self) -> bool:
        """Whether the folder holds a LoRA adapter, so that others of the same base can run in one batch with it."""
        return self.pair is None or (self.pair.trainable == "lora" and not self.pair.whole)

    @property
    def weights(self) -> tuple[str, ...]:
        """The files without which nothing can be loaded."""
        if self.pair is not None and self.pair.whole:
            return ("config.json",)
        return ("adapter_config.json", "adapter_model.safetensors")


def read_manifest(path: str | Path) -> Manifest:
    """Read and validate `uld.json`; imports neither torch nor peft. Raises `ArtifactCorrupt`, `ArtifactMismatch` for another method's."""
    file = Path(path) / MANIFEST
    if not file.exists() and (Path(path) / DIRECT).is_file():
        raise ArtifactMismatch(
            f"{path} is no assistant: `--method direct` put a large model's own weights there",
            hint="serve these weights in the large model's place, or train an assistant with --method uld",
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactCorrupt(
            f"{path} is no assistant folder: {MANIFEST} cannot be read", hint="give the folder that `uld-sdk train -o` wrote"
        ) from error
    try:
        value = json.loads(text)
        if isinstance(value, dict) and value.get("format", 1) != 1:
            raise ArtifactCorrupt(
                f"{file} has format {value['format']!r}; this version reads format 1", hint="pip install --upgrade uld-sdk"
            )
        manifest = Manifest.model_validate(value)
    except json.JSONDecodeError as error:
        raise ArtifactCorrupt(f"{file} is not whole JSON (line {error.lineno}: {error.msg})", hint=RETRAIN) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactCorrupt(f"{file} is not a valid manifest: {where}: {first['msg']}", hint=RETRAIN) from error
    if (found := digest_of(value)) != manifest.sha256:
        stated = f"{manifest.sha256[:12]}…" if manifest.sha256 else "none"
        raise ArtifactCorrupt(
            f"{file} is not as it was saved: its content has SHA-256 {found[:12]}…, it states {stated} (a setting was edited by hand?)",
            hint=RETRAIN,
        )
    return manifest


def write_manifest(path: str | Path, manifest: Manifest) -> Manifest:
    """Write `uld.json` into the folder, whole or not at all, with its own SHA-256 anew; returns what was written."""
    return Manifest.model_validate(write_sealed(Path(path) / MANIFEST, manifest.model_dump(mode="json")))


def write_sealed(file: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a JSON object with its own SHA-256 under `sha256`, whole or not at all, for its owner only; returns what was written."""
    sealed = {**value, "sha256": digest_of(value)}
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.chmod(0o600)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return sealed


def digest_of(value: dict[str, Any]) -> str:
    """SHA-256 of an object in canonical JSON, but for its own `sha256`."""
    rest = {name: item for name, item in value.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
