"""The assistants' side of a client: loaded once, they render prompts as they were trained, and read answers along."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from uld_adapters.errors import UsageError
from uld_adapters.vocabulary.alignment import Alignment
from uld_offset_models.several import JointRule
from uld_offset_models.shift import Rule
from uld_sdk.aligning import Aligned
from uld_sdk.batching import SmallWorker
from uld_sdk.bridge_reader import BridgeReader
from uld_sdk.bridge_reading import Bridging
from uld_sdk.joint_reader import JointReader
from uld_sdk.prompts import Prompt, check_room, render_as_trained
from uld_sdk.reading import Reader

if TYPE_CHECKING:
    from uld_offset_models.manifest import Manifest


@dataclass(frozen=True)
class Chosen:
    """An assistant that a client is to use: its folder and manifest, the rule that holds for it, and where its base lies now."""

    folder: Path
    manifest: "Manifest"
    rule: Rule
    base: str | None

    @property
    def kind(self) -> tuple[str, int]:
        """What is equal of two that can run as one batch: the base's weights and their number of layers, of LoRA adapters."""
        base = self.manifest.base
        return base.sha256 if self.manifest.lora else self.manifest.sha256, base.layers


def choose(folder: str | Path, base: str | Path | None, said: Mapping[str, Any]) -> Chosen:
    """Read the manifest of a folder; what is `said` of alpha, margin, filter and tail holds instead of it. Raises `ArtifactError`."""
    from uld_offset_models.manifest import read_manifest

    manifest = read_manifest(folder)
    own = {name: getattr(manifest, name) for name in ("alpha", "margin", "filter", "tail")}
    rule = Rule(**{**own, **said}, method=manifest.method)
    return Chosen(Path(folder), manifest, rule, None if base is None else str(base))


def check_once(chosen: Sequence[Chosen]) -> None:
    """Raise `UsageError` where the weights of an assistant come twice, whatever the names: its shift would count twice."""
    seen: dict[frozenset[tuple[str, str]], Chosen] = {}
    for each in chosen:
        weights = frozenset(file for file in each.manifest.files.items() if file[0].endswith(".safetensors"))
        if (there := seen.setdefault(weights, each)) is not each:
            raise UsageError(f"the assistant {each.folder} is there already, as {there.folder}", hint="name every assistant once")


def rule_of(chosen: Sequence[Chosen]) -> Rule | JointRule:
    """The rule of one, or those of several together; without any, one that nothing is read by."""
    rules = tuple(each.rule for each in chosen)
    return JointRule(rules) if len(rules) > 1 else rules[0] if rules else Rule()


@dataclass(frozen=True)
class SmallSide:
    """A loaded assistant or pair beside a large model; `context` is how many tokens its base can read, None where that is not known.

    Those of one worker run as one batch. `begin` gives the track of a text of which nothing has been read.
    """

    chosen: Chosen
    worker: SmallWorker
    begin: Callable[[], Any]
    mode: str
    alignment: Alignment | Bridging
    tokenizer: Any
    context: int | None

    def reader(self, prompt: Prompt, *, raw: bool, new: int) -> Reader | BridgeReader:
        """Reads along one answer of at most `new` tokens; raises `ContextExceeded` where prompt and answer do not fit."""
        ids = render_as_trained(self.tokenizer, prompt, raw=raw, chat_template=self.chosen.manifest.chat_template)
        check_room(len(ids), new, self.context, whose="the assistant's")
        if not isinstance(self.alignment, Bridging):
            return Reader(self.worker, self.alignment, ids, self.begin())
        start, begun = self.tokenizer.bos_token_id, None
        if raw and start is not None and isinstance(prompt, str):  # the answer goes on in the middle of a text
            ids, begun = [start], prompt.encode()
        return BridgeReader(self.worker, self.alignment, self.chosen.rule, ids, self.begin(), begun=begun, context=self.context)


@dataclass(frozen=True)
class SmallSides:
    """All assistants of a client at one time, in the order in which they were named; an answer keeps those that it began with."""

    sides: tuple[SmallSide, ...]

    @classmethod
    def load(cls, chosen: Sequence[Chosen], align: Callable[..., Aligned], *, device: str, before: Self | None = None) -> Self:
        """Load the artifacts and check them, those of one base and as many layers as one batch; what `before` has is not loaded again.

        `align` gives the alignment to the tokenizer in a folder, of this `fingerprint`. Raises `ArtifactError`, and `UsageError` for a
        device that is not there.
        """
        groups: dict[tuple[str, int], list[Chosen]] = {}
        for each in chosen:
            groups.setdefault(each.kind, []).append(each)
        found: dict[str, SmallSide] = {}
        for group in groups.values():
            kept = [] if before is None else [side for side in before.sides if side.chosen.kind == group[0].kind]
            same = [side.chosen for side in kept] == group
            found |= {side.chosen.manifest.sha256: side for side in (kept if same else _load_group(group, align, device))}
        return cls(tuple(found[each.manifest.sha256] for each in chosen))

    @property
    def mode(self) -> str:
        """How the assistants' tokens are told in the large model's; several modes in their order."""
        return ", ".join(dict.fromkeys(side.mode for side in self.sides))

    def reader(self, prompt: Prompt, *, raw: bool, new: int) -> Reader | BridgeReader | JointReader:
        """Reads along one answer of at most `new` tokens, in the terms of `rule_of` them; raises `ContextExceeded`."""
        readers = tuple(side.reader(prompt, raw=raw, new=new) for side in self.sides)
        return readers[0] if len(readers) == 1 else JointReader(readers)

    @property
    def workers(self) -> list[SmallWorker]:
        """The threads that run small models, one a base."""
        return list({id(side.worker): side.worker for side in self.sides}.values())


def _load_group(group: Sequence[Chosen], align: Callable[..., Aligned], device: str) -> list[SmallSide]:
    from uld_adapters.device import usable_device
    from uld_offset_models.batch_reading import GroupScorer
    from uld_offset_models.loading import load_together
    from uld_offset_models.tree_scorer import TreeScorer

    aligned = align(group[0].folder, fingerprint=group[0].manifest.tokenizer_sha256)
    base = next((each.base for each in group if each.base is not None), None)
    artifacts = load_together([each.folder for each in group], base=base, device=str(usable_device(device)))
    members = [artifact.scorer(threshold=each.rule.margin) for artifact, each in zip(artifacts, group, strict=True)]
    scorer: Any = TreeScorer(members) if isinstance(aligned.alignment, Bridging) else GroupScorer(members)
    worker = SmallWorker(scorer)
    return [
        SmallSide(each, worker, partial(scorer.track, at), aligned.mode, aligned.alignment, artifact.tokenizer, artifact.context)
        for at, (each, artifact) in enumerate(zip(group, artifacts, strict=True))
    ]
