"""A trained assistant or pair as a folder: adapter or weights, gate, tokenizer, card, and a manifest with every file's SHA-256."""

import hashlib
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import ArtifactCorrupt, UsageError
from uld_offset_models.card import model_card
from uld_offset_models.manifest import DIRECT, MANIFEST, RETRAIN, Calibration, Manifest, read_manifest, write_manifest
from uld_offset_models.saving import saving

if TYPE_CHECKING:
    from uld_offset_models.assistant import Gate, SmallModel
    from uld_offset_models.pair import Pair
    from uld_offset_models.pair_scorer import PairScorer
    from uld_offset_models.scorer import Scorer

GATE = "gate.safetensors"
_HARMLESS = ("*.md", "LICENSE*", "Thumbs.db", "desktop.ini")  # no loader reads these, nor hidden files


@dataclass(frozen=True)
class Artifact:
    """A loaded assistant or pair, ready for inference."""

    path: Path
    manifest: Manifest
    model: "SmallModel | Pair"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the training."""
        return self.small.tokenizer

    @property
    def small(self) -> "SmallModel":
        """The assistant, of a pair o'."""
        from uld_offset_models.pair import Pair

        return self.model.tuned if isinstance(self.model, Pair) else self.model

    @property
    def context(self) -> int | None:
        """How many tokens of text the model can read, None where that is not known."""
        most = getattr(self.small.backbone.config, "max_position_embeddings", None)
        prompt = getattr(self.model, "prompt", ())
        return most if most is None or not prompt else most - prompt[0][0].shape[1]

    def scorer(self, *, threshold: float) -> "Scorer | PairScorer":
        """What reads along with the loaded model; `threshold` (nats) is where a position counts as touched."""
        from uld_offset_models.pair import Pair
        from uld_offset_models.pair_scorer import PairScorer
        from uld_offset_models.scorer import Scorer

        return PairScorer(self.model, threshold=threshold) if isinstance(self.model, Pair) else Scorer(self.model, threshold=threshold)


def verify_files(path: Path, manifest: Manifest) -> None:
    """Compare every file with its SHA-256 in the manifest; raises `ArtifactCorrupt` naming each that differs or was added.

    Added files count where a loader might read them: a chat template put there later would change every prompt.
    """
    wrong = []
    for name, expected in manifest.files.items():
        file = path / name
        if ".." in PurePosixPath(name).parts or not file.is_relative_to(path) or not file.is_file():
            wrong.append(f"{name} is missing")
        elif (found := _sha256(file)) != expected:
            wrong.append(f"{name} differs ({file.stat().st_size} bytes, SHA-256 {found[:12]}…, expected {expected[:12]}…)")
    required = set(manifest.weights) | ({GATE} if manifest.gate else set())
    wrong += [f"{name} is not listed in {MANIFEST}" for name in sorted(required - manifest.files.keys())]
    hint = RETRAIN if wrong else "take out of the folder what does not belong there"
    wrong += [f"{name} was added" for name in _members(path) if name not in manifest.files and not _harmless(name)]
    if wrong:
        raise ArtifactCorrupt(f"{path} is not as it was saved: {'; '.join(wrong)}", hint=hint)


def save_artifact(
    output: str | Path, *, model: Any, gate: "Gate | None", tokenizer: Any, manifest: Manifest, overwrite: bool = False
) -> Manifest:
    """Write the folder beside its final name and rename it at the end; returns the manifest with the files' hashes.

    `model` is a peft model, or a transformers model to be saved whole. Raises `SaveFailed` (and leaves nothing under `output`) when the
    disk is full or not writable.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    with saving(output) as folder:
        from safetensors.torch import save_file

        save_weights(model, folder, base=manifest.base.id)
        if gate is not None:
            save_file({name: value.detach().float().cpu().contiguous() for name, value in gate.state_dict().items()}, str(folder / GATE))
        tokenizer.save_pretrained(str(folder))
        return seal(folder, manifest)


def save_weights(model: Any, folder: Path, *, base: str) -> None:
    """The adapter of a peft model, which says that it belongs on `base`; a transformers model whole."""
    if not hasattr(model, "peft_config"):
        model.save_pretrained(str(folder))
        return
    model.peft_config["default"].base_model_name_or_path = base
    # Asked to decide by itself whether embeddings belong in the file, peft looks for a config.json on the hub.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write card and manifest for the files that lie in the folder; whatever changes an artifact ends with this."""
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    return write_manifest(folder, manifest.model_copy(update={"files": {name: _sha256(folder / name) for name in _members(folder)}}))


def recalibrate(path: str | Path, calibration: Calibration) -> Manifest:
    """Give an artifact the chosen alpha, margin and filter, with the record of the choice; returns its new manifest.

    The folder is made anew beside its name and takes its place whole, for card and manifest must change together. Raises
    `ArtifactCorrupt` where it is not as it was saved, and `SaveFailed`, which leaves it as it was.
    """
    path = Path(path).resolve()
    manifest = read_manifest(path)
    verify_files(path, manifest)
    changed = {**manifest.model_dump(), **calibration.chosen, "calibration": calibration.model_dump()}
    with saving(path) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        return seal(folder, Manifest.model_validate(changed))


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace a folder unless told to, and anything that `uld-sdk train` did not make even then."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise UsageError(f"{output} already exists", hint="choose another -o/--output, or add --overwrite")
    if output.exists() and not any((output / name).is_file() for name in (MANIFEST, DIRECT)):
        raise UsageError(f"{output} exists and is no assistant folder", hint="choose another -o/--output")


def _members(folder: Path) -> list[str]:
    """Every file of the folder but the manifest and hidden ones (.git, .DS_Store); links to folders count, being read through."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return [name for name in names if name != MANIFEST and not any(part.startswith(".") for part in PurePosixPath(name).parts)]


def _harmless(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name, pattern) for pattern in _HARMLESS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
