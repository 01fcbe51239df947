"""`uld-sdk train`: data and a base model in, the folder of an assistant or of a tuned model out."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from uld_sdk.cli.options import Json, spread
from uld_sdk.cli.output import facts, print_json, stdout

DATA = "Data"
MODEL = "Assistant"
OBJECTIVE = "Methods direct and offset"
RUN = "Run"
_KINDS = {"uld": "assistant", "offset": "pair"}


@dataclass(frozen=True)
class TrainingOptions:
    """Every argument of `uld_sdk.train` as a flag; what is not given comes from the recipe, then from the preset."""

    base: Annotated[
        str | None, typer.Option("--base", help="Base model: folder, hub name or GGUF file.", rich_help_panel=MODEL, show_default=False)
    ] = None
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget",
            help="What to forget: JSONL, CSV, Parquet, a datasets folder, or owner/name:config:split on the hub.",
            rich_help_panel=DATA,
        ),
    ] = None
    retain: Annotated[str | None, typer.Option("--retain", help="What to keep, in the same forms.", rich_help_panel=DATA)] = None
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to make.", rich_help_panel=RUN)] = None
    method: Annotated[
        str | None,
        typer.Option("--method", help="uld, the default: an assistant; offset: a pair; direct: the base itself.", rich_help_panel=MODEL),
    ] = None
    preset: Annotated[
        str | None, typer.Option("--preset", help="gated, paper or release; direct; offset, offset-gated.", rich_help_panel=MODEL)
    ] = None
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="ga, npo, dpo or relabel, + none, gd or kl; npo+kl is the default.", rich_help_panel=OBJECTIVE),
    ] = None
    beta: Annotated[float | None, typer.Option("--beta", help="Of npo and dpo, per nat.", rich_help_panel=OBJECTIVE)] = None
    trainable: Annotated[
        str | None, typer.Option("--trainable", help="lora, or full: all weights, or p-adapter (offset).", rich_help_panel=OBJECTIVE)
    ] = None
    refusals: Annotated[
        str | None, typer.Option("--refusals", help="For dpo and relabel: text file, one a line; or built-in.", rich_help_panel=OBJECTIVE)
    ] = None
    cache: Annotated[
        str | None, typer.Option("--cache", help="Of offset: what the target says, by `uld-sdk cache`.", rich_help_panel=OBJECTIVE)
    ] = None
    target: Annotated[
        str | None, typer.Option("--target", help="Of offset, for want of a cache: the target itself.", rich_help_panel=OBJECTIVE)
    ] = None
    target_tokenizer: Annotated[
        str | None,
        typer.Option("--target-tokenizer", help="Of offset: the cache's tokenizer, if it is not the base's.", rich_help_panel=OBJECTIVE),
    ] = None
    start: Annotated[
        str | None,
        typer.Option(
            "--start", help="Of offset: where the trained model o' begins, if not at the frozen o (--base).", rich_help_panel=OBJECTIVE
        ),
    ] = None
    tail: Annotated[
        str | None, typer.Option("--tail", help="Of offset: truncate what is not reported, or complete it.", rich_help_panel=OBJECTIVE)
    ] = None
    virtual_tokens: Annotated[int | None, typer.Option("--virtual-tokens", min=1, help="Of a p-adapter.", rich_help_panel=OBJECTIVE)] = None
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Keep only the first layers.", rich_help_panel=MODEL)] = None
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of the LoRA matrices.", rich_help_panel=MODEL)] = None
    lora_alpha: Annotated[int | None, typer.Option("--lora-alpha", min=1, help="Scale of the LoRA matrices.", rich_help_panel=MODEL)] = None
    gate: Annotated[
        bool | None,
        typer.Option("--gate/--no-gate", help="Train a gate that shuts the correction off outside the forget set.", rich_help_panel=MODEL),
    ] = None
    weight: Annotated[float | None, typer.Option("--weight", help="Weight of the uniform or retain loss.", rich_help_panel=MODEL)] = None
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Strength of the correction (gated: .75, and more for a base of few tokens).", rich_help_panel=MODEL),
    ] = None
    trained_alpha: Annotated[
        float | None,
        typer.Option(
            "--trained-alpha", help="Of offset: the alpha to train with, where --alpha is for answering.", rich_help_panel=OBJECTIVE
        ),
    ] = None
    margin: Annotated[float | None, typer.Option("--margin", min=0.0, help="Dead zone in nats.", rich_help_panel=MODEL)] = None
    filter: Annotated[
        float | None,
        typer.Option("--filter", help="Least share of the top probability that a candidate needs; 0: off.", rich_help_panel=MODEL),
    ] = None
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--no-chat-template", help="Render rows by the base's template.", rich_help_panel=DATA)
    ] = None
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Longest row in tokens.", rich_help_panel=DATA)] = None
    holdout: Annotated[
        float | None, typer.Option("--holdout", min=0.0, max=0.9, help="Share of the retain set to watch.", rich_help_panel=DATA)
    ] = None
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Optimiser steps.", rich_help_panel=RUN)] = None
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=RUN)] = None
    min_steps: Annotated[
        int | None, typer.Option("--min-steps", min=1, help="Fewest steps, however few the epochs make.", rich_help_panel=RUN)
    ] = None
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows a step.", rich_help_panel=RUN)] = None
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Highest learning rate; --schedule says how it falls.", rich_help_panel=RUN)
    ] = None
    gate_rate: Annotated[
        float | None, typer.Option("--gate-rate", help="Learning rate of the gate; else --learning-rate.", rich_help_panel=RUN)
    ] = None
    schedule: Annotated[str | None, typer.Option("--schedule", help="constant, linear, cosine.", rich_help_panel=RUN)] = None
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", min=0.0, help="Of AdamW.", rich_help_panel=RUN)] = None
    clip: Annotated[
        float | None, typer.Option("--clip", min=0.0, help="Largest norm of the gradient; 0 turns it off.", rich_help_panel=RUN)
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Of adapter, order and sampling.", rich_help_panel=RUN)] = None
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda.", rich_help_panel=RUN)] = None
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16.", rich_help_panel=RUN)] = None
    stop_untouched: Annotated[
        float | None,
        typer.Option(
            "--stop-untouched",
            min=0.0,
            max=1.0,
            help="Once the forget set is learned, stop when less of the hold-out is untouched.",
            rich_help_panel=RUN,
        ),
    ] = None
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", min=0.0, help="Stop after this time.", rich_help_panel=RUN)] = None
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", min=1, help="Steps between two checkpoints; else a quarter of the run.", rich_help_panel=RUN),
    ] = None
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=RUN)] = None
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace the output folder.", rich_help_panel=RUN)] = None
    progress: Annotated[bool | None, typer.Option("--progress/--no-progress", help="Bar on stderr.", rich_help_panel=RUN)] = None

    def chosen(self) -> dict[str, Any]:
        """The flags that were given, named as the arguments of `train`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@spread
def train(
    options: TrainingOptions,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", exists=True, dir_okay=False, help="YAML with any of these options; flags win.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an assistant that remembers the forget set, and is unsure of everything else; or a pair; or tune the base itself.

    What is not given comes from the recipe, then from the preset.
    """
    from uld_sdk.training import train as run

    result = run(recipe=recipe, **options.chosen())
    from uld_offset_models.processes import is_main

    if not is_main():  # one of several training processes: rank 0 speaks for all
        return
    manifest = result.manifest.model_dump(mode="json")
    if as_json:
        print_json({"path": str(result.path), "seconds": result.seconds, "manifest": manifest})
        return
    stdout().print(
        facts(
            "",
            {
                _KINDS.get(manifest["method"]) or manifest["objective"]: str(result.path),
                "seconds": result.seconds,
                "steps": manifest["steps"],
                **{f"{name} loss": value for name, value in manifest["losses"].items()},
                "parameters": manifest.get("assistant_parameters") or manifest["parameters"],
                "trained": manifest["trainable_parameters"],
            },
        )
    )
