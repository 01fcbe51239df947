"""The model card of an artifact: what it is, how to use it, and the warning that belongs on it."""

from uld_offset_models.manifest import BaseReference, Calibration, Manifest, PairReference

KEEP = "Treat this folder as you treat the forget set itself: do not publish it, and delete it when you may no longer keep that data."
WARNING = (
    "This assistant remembers what it must make others forget. Its weights hold the forget set in a form that can be read out by "
    f"sampling from them. {KEEP}"
)
PAIR_WARNING = f"What a pair pushes away from is what is to be forgotten: the difference of its models tells what that is. {KEEP}"


def model_card(manifest: Manifest) -> str:
    """README.md of an artifact, in Markdown with the front matter that hubs read."""
    base = manifest.base
    layers = f"first {base.layers} layers" if base.truncated else f"all {base.layers} layers"
    losses = ", ".join(f"{name} {value:.4f}" for name, value in manifest.losses.items())
    training = f"{manifest.steps} steps in {manifest.training_seconds:.0f} s; final losses: {losses}" if manifest.steps else "none"
    calibration = manifest.calibration
    chosen = "those of the training" if calibration is None else _chosen(calibration)
    whole = manifest.pair is not None and manifest.pair.whole
    title, warning, what, more = _assistant() if manifest.pair is None else _pair(manifest.pair, manifest)
    return f"""---
library_name: {"transformers" if whole else "peft"}
base_model: {base.id}
tags: [unlearning, uld]
---
# {title} ({manifest.preset})

> **Warning.** {warning}

{what}

| | |
| --- | --- |
| base | {base.id}, {layers}, SHA-256 {base.sha256[:16]}… |
| trainable parameters | {manifest.trainable_parameters:,} of {manifest.assistant_parameters:,} |
| gate | {"yes, in gate.safetensors" if manifest.gate else "no"} |
| alpha, margin (nats), filter | {manifest.alpha}, {manifest.margin}, {manifest.filter} |
| their choice | {chosen} |
{more}| training | {training} |

## Use

```python
from uld_sdk import UnlearnedClient

client = UnlearnedClient(backend="tgi", base_url="http://localhost:8080", assistant="THIS FOLDER")
print(client.generate("...").text)
```

{_loading(base, whole=whole)}

`uld.json` holds every setting, the hashes of the data (not the data) and of every file here.
"""


def _assistant() -> tuple[str, str, str, str]:
    what = """A small model trained to know a forget set and to be uniform on everything else. `uld-sdk` subtracts its log-probabilities
from those of a large model, which then answers as if it had never seen the forget set:
log q(y) = log p_M(y) - alpha * max(0, log p_a(y) - log u - margin) + constant."""
    return "ULD assistant", WARNING, what, ""


def _pair(pair: PairReference, manifest: Manifest) -> tuple[str, str, str, str]:
    origin = "the base o that it started from" if manifest.training.get("start") is None else "the base o, another checkpoint of its kind"
    what = f"""A small model o' and {origin}. `uld-sdk` adds what o' says otherwise than o to the log-probabilities
of a large model, which then answers as if it had forgotten, too (delta-unlearning, arXiv 2404.11045):
d = c (log p_o'(y) - log p_o(y)),
log q(y) = log p_M(y) + alpha * sign(d) * max(0, |d| - margin) + constant."""
    k = "complete distributions" if pair.top_logprobs is None else f"the top {pair.top_logprobs}"
    more = f"| objective | {pair.objective}, alpha {pair.alpha} in training, {pair.trainable} |\n"
    more += f"| target | {pair.target}, {k}, tail policy {pair.tail} |\n"
    if not manifest.steps:
        more = f"| made of | two checkpoints, without training; tail policy {pair.tail} |\n"
    return "Pair for delta-unlearning", PAIR_WARNING, what, more


def _loading(base: BaseReference, *, whole: bool) -> str:
    if whole:
        return """O' alone loads with transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```"""
    return f"""The adapter alone loads with peft, on the same cut of the base:

```python
from peft import PeftModel
from uld_offset_models.assistant import load_base

model, tokenizer = load_base({base.id!r}, layers={base.layers})
model = PeftModel.from_pretrained(model, "THIS FOLDER")
```"""


def _chosen(calibration: Calibration) -> str:
    k = "all" if calibration.top_logprobs is None else f"the top {calibration.top_logprobs}"
    rows = " and ".join(f"{count} {kind}" for kind, count in calibration.rows.items())
    where = f"{rows} hold-out rows, {calibration.target}, {k} log-probabilities a token"
    return f"{calibration.rule}; {where}; {calibration.date}"
