"""The assistant's side of a client: loaded once, it renders prompts as the assistant was trained, and reads answers along."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from uld_adapters.errors import ArtifactMismatch
from uld_adapters.vocabulary.alignment import Alignment
from uld_offset_models.shift import Rule
from uld_sdk.batching import SmallWorker
from uld_sdk.prompts import Prompt, check_room, render_as_trained
from uld_sdk.reading import Reader

if TYPE_CHECKING:
    from uld_offset_models.manifest import Manifest


@dataclass(frozen=True)
class SmallSide:
    """A loaded assistant beside a large model; `context` is how many tokens its base can read, None where that is not known."""

    worker: SmallWorker
    alignment: Alignment
    tokenizer: Any
    manifest: "Manifest"
    context: int | None

    @classmethod
    def load(cls, folder: str | Path, alignment: Alignment, rule: Rule, *, base: str | Path | None, device: str) -> Self:
        """Load the artifact and check it; raises `ArtifactError`, and `UsageError` for a device that is not there."""
        from uld_adapters.device import usable_device
        from uld_offset_models.artifact import load_artifact
        from uld_offset_models.scorer import Scorer

        artifact = load_artifact(folder, base=None if base is None else str(base), device=str(usable_device(device)))
        if artifact.manifest.method != "uld":
            raise ArtifactMismatch(f"{folder} holds no assistant but method {artifact.manifest.method}", hint="use --method uld")
        worker = SmallWorker(Scorer(artifact.model, threshold=rule.margin))
        context = getattr(artifact.model.backbone.config, "max_position_embeddings", None)
        return cls(worker, alignment, artifact.model.tokenizer, artifact.manifest, context)

    def reader(self, prompt: Prompt, *, raw: bool, new: int) -> Reader:
        """Reads along one answer of at most `new` tokens; raises `ContextExceeded` where prompt and answer do not fit."""
        from uld_offset_models.scorer import Track

        ids = render_as_trained(self.tokenizer, prompt, raw=raw, chat_template=self.manifest.chat_template)
        check_room(len(ids), new, self.context, whose="the assistant's")
        return Reader(self.worker, self.alignment, ids, Track())

    def close(self) -> None:
        """End the small model's thread."""
        self.worker.close()
