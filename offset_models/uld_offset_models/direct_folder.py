"""What `--method direct` leaves behind: a plain peft adapter or transformers folder, its tokenizer, a card, and `direct.json`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uld_offset_models.artifact import check_output, save_weights
from uld_offset_models.manifest import DIRECT, BaseReference, Frozen
from uld_offset_models.saving import saving

if TYPE_CHECKING:
    from uld_offset_models.white_box import WhiteBox


class DirectManifest(Frozen):
    """`direct.json`: how weights were trained. `losses` are means of the last steps in nats, `data` maps a name to a hash of the rows."""

    format: Literal[1] = 1
    method: Literal["direct"] = "direct"
    preset: str
    objective: str
    trainable: Literal["lora", "full"]
    base: BaseReference
    tokenizer_sha256: str
    chat_template: bool
    dtype: str
    training: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    training_seconds: float
    losses: dict[str, float]
    steps: int
    parameters: int
    trainable_parameters: int
    created: str


def save_direct(output: Path, *, model: "WhiteBox", tokenizer: Any, manifest: DirectManifest, overwrite: bool = False) -> DirectManifest:
    """Write the folder beside its final name and rename it at the end; raises `SaveFailed` and leaves nothing under `output`."""
    check_output(output, overwrite=overwrite)
    with saving(output) as folder:
        save_weights(model.model, folder, base=manifest.base.id)
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(direct_card(manifest), encoding="utf-8")
        (folder / DIRECT).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def direct_card(manifest: DirectManifest) -> str:
    """README.md of the folder, in Markdown with the front matter that hubs read."""
    base = manifest.base
    lora = manifest.trainable == "lora"
    losses = ", ".join(f"{name} {value:.4f}" for name, value in manifest.losses.items())
    if lora:
        loading = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base.id!r}), "THIS FOLDER")"""
    else:
        loading = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")"""
    return f"""---
library_name: {"peft" if lora else "transformers"}
base_model: {base.id}
tags: [unlearning]
---
# {manifest.objective} on {Path(base.id).name}

Unlearning in the model's own weights ({"a LoRA adapter" if lora else "all of them"}), a white-box baseline. This is no
assistant: `uld-sdk` refuses it as one.

| | |
| --- | --- |
| base | {base.id}, SHA-256 {base.sha256[:16]}… |
| objective | {manifest.objective}, retain weight {manifest.training["weight"]:g}, beta {manifest.training["beta"]:g} |
| trained parameters | {manifest.trainable_parameters:,} of {manifest.parameters:,} |
| training | {manifest.steps} steps in {manifest.training_seconds:.0f} s; final losses: {losses} |

```python
{loading}
```

`{DIRECT}` holds every setting and the hashes of the data (not the data).
"""
