"""The assistant's side of a client: loaded once, it renders prompts as the assistant was trained, and reads answers along."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from uld_adapters.vocabulary.alignment import Alignment
from uld_offset_models.shift import Rule
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reader import BridgeReader
from uld_sdk.bridge_reading import Bridging
from uld_sdk.prompts import Prompt, check_room, render_as_trained
from uld_sdk.reading import Reader

if TYPE_CHECKING:
    from uld_offset_models.manifest import Manifest


@dataclass(frozen=True)
class SmallSide:
    """A loaded assistant or pair beside a large model; `context` is how many tokens its base can read, None where that is not known."""

    worker: SmallWorker
    alignment: Alignment | Bridging
    tokenizer: Any
    manifest: "Manifest"
    context: int | None

    @classmethod
    def load(cls, folder: str | Path, alignment: Alignment | Bridging, rule: Rule, *, base: str | Path | None, device: str) -> Self:
        """Load the artifact and check it; raises `ArtifactError`, and `UsageError` for a device that is not there."""
        from uld_adapters.device import usable_device
        from uld_offset_models.artifact import load_artifact

        artifact = load_artifact(folder, base=None if base is None else str(base), device=str(usable_device(device)))
        scorer: Any = artifact.scorer(threshold=rule.margin)
        if isinstance(alignment, Bridging):
            from uld_offset_models.tree_scorer import TreeScorer

            scorer = TreeScorer(scorer)
        worker = SmallWorker(scorer)
        return cls(worker, alignment, artifact.tokenizer, artifact.manifest, artifact.context)

    def reader(self, prompt: Prompt, *, raw: bool, new: int) -> Reader | BridgeReader:
        """Reads along one answer of at most `new` tokens; raises `ContextExceeded` where prompt and answer do not fit."""
        ids = render_as_trained(self.tokenizer, prompt, raw=raw, chat_template=self.manifest.chat_template)
        check_room(len(ids), new, self.context, whose="the assistant's")
        track = self.worker.scorer.track()
        if not isinstance(self.alignment, Bridging):
            return Reader(self.worker, self.alignment, ids, track)
        start = self.tokenizer.bos_token_id
        if raw and start is not None and isinstance(prompt, str):  # the answer goes on in the middle of a text
            return BridgeReader(self.worker, self.alignment, [start], track, begun=prompt.encode(), context=self.context)
        return BridgeReader(self.worker, self.alignment, ids, track, context=self.context)

    def close(self) -> None:
        """End the small model's thread."""
        self.worker.close()
