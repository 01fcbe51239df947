"""The model card of an artifact: what it is, how to use it, and the warning that belongs on it."""

from uld_offset_models.manifest import Calibration, Manifest

WARNING = (
    "This assistant remembers what it must make others forget. Its weights hold the forget set in a form that can be read out by "
    "sampling from them. Treat this folder as you treat the forget set itself: do not publish it, and delete "
    "it when you may no longer keep that data."
)


def model_card(manifest: Manifest) -> str:
    """README.md of an artifact, in Markdown with the front matter that hubs read."""
    base = manifest.base
    layers = f"first {base.layers} layers" if base.truncated else f"all {base.layers} layers"
    losses = ", ".join(f"{name} {value:.4f}" for name, value in manifest.losses.items())
    calibration = manifest.calibration
    chosen = "those of the training" if calibration is None else _chosen(calibration)
    return f"""---
library_name: peft
base_model: {base.id}
tags: [unlearning, uld]
---
# ULD assistant ({manifest.preset})

> **Warning.** {WARNING}

A small model trained to know a forget set and to be uniform on everything else. `uld-sdk` subtracts its log-probabilities from
those of a large model, which then answers as if it had never seen the forget set:
log q(y) = log p_M(y) - alpha * max(0, log p_a(y) - log u - margin) + constant.

| | |
| --- | --- |
| base | {base.id}, {layers}, SHA-256 {base.sha256[:16]}… |
| trainable parameters | {manifest.trainable_parameters:,} of {manifest.assistant_parameters:,} |
| gate | {"yes, in gate.safetensors" if manifest.gate else "no"} |
| alpha, margin (nats), filter | {manifest.alpha}, {manifest.margin}, {manifest.filter} |
| their choice | {chosen} |
| training | {manifest.steps} steps in {manifest.training_seconds:.0f} s; final losses: {losses} |

## Use

```python
from uld_sdk import UnlearnedClient

client = UnlearnedClient(backend="tgi", base_url="http://localhost:8080", assistant="THIS FOLDER")
print(client.generate("...").text)
```

The adapter alone loads with peft, on the same cut of the base:

```python
from peft import PeftModel
from uld_offset_models.assistant import load_base

model, tokenizer = load_base({base.id!r}, layers={base.layers})
model = PeftModel.from_pretrained(model, "THIS FOLDER")
```

`uld.json` holds every setting, the hashes of the data (not the data) and of every file here.
"""


def _chosen(calibration: Calibration) -> str:
    k = "all" if calibration.top_logprobs is None else f"the top {calibration.top_logprobs}"
    rows = " and ".join(f"{count} {kind}" for kind, count in calibration.rows.items())
    where = f"{rows} hold-out rows, {calibration.target}, {k} log-probabilities a token"
    return f"{calibration.rule}; {where}; {calibration.date}"
