"""The assistant's side of a client: loaded once, it renders prompts as the assistant was trained, and reads answers along."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from uld_adapters.vocabulary.classify import Alignment
from uld_offset_models.shift import Rule
from uld_sdk.batching import SmallWorker
from uld_sdk.prompts import Prompt, check_room, render_as_trained
from uld_sdk.reading import Reader

if TYPE_CHECKING:
    from uld_offset_models.manifest import Manifest


@dataclass(frozen=True)
class SmallSide:
    """A loaded assistant or pair beside a large model; `context` is how many tokens its base can read, None where that is not known."""

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

        artifact = load_artifact(folder, base=None if base is None else str(base), device=str(usable_device(device)))
        worker = SmallWorker(artifact.scorer(threshold=rule.margin))
        return cls(worker, alignment, artifact.tokenizer, artifact.manifest, artifact.context)

    def reader(self, prompt: Prompt, *, raw: bool, new: int) -> Reader:
        """Reads along one answer of at most `new` tokens; raises `ContextExceeded` where prompt and answer do not fit."""
        ids = render_as_trained(self.tokenizer, prompt, raw=raw, chat_template=self.manifest.chat_template)
        check_room(len(ids), new, self.context, whose="the assistant's")
        return Reader(self.worker, self.alignment, ids, self.worker.scorer.track())

    def close(self) -> None:
        """End the small model's thread."""
        self.worker.close()
