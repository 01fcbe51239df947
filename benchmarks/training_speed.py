"""Training steps of the product against a plain Trainer: `python benchmarks/training_speed.py [--steps 6] [--dtype float32]`.

Both train the same adapter and gate (same seed) on the demo's rows and base, the same rows in each step, in float32. The plain
one pads its batches, keeps every logit and takes the losses by log_softmax, as a first implementation would. Prints and writes
JSON: seconds a step of each, their ratio, and the largest difference between their losses.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from uld_offset_models.assistant import base_fingerprint, load_base
from uld_offset_models.data import build_sets, read_rows
from uld_offset_models.encoding import Encoded, encode
from uld_offset_models.network import Assistant, build_assistant
from uld_offset_models.recipes import resolve
from uld_offset_models.steps import Steps
from uld_offset_models.trainer import UldTrainer
from uld_sdk.demo.job import Clock, Plan, ask_model
from uld_sdk.demo.questions import KINDS, load_questions
from uld_sdk.demo.server import packaged_model

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "runs" / "demo" / "own_answers.json"
LAYERS = 6


class Rows(torch.utils.data.Dataset[list[tuple[Encoded, bool]]]):
    """The rows of each step, forget rows first, as `Steps` deals them."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[tuple[Encoded, bool]]:
        return [(row, stream == 0) for stream in (0, 1) for row in self.steps._rows(stream, index)]


def padded(items: list[list[tuple[Encoded, bool]]]) -> dict[str, torch.Tensor]:
    """Right-padded ids, attention mask, labels (-100 where nothing is trained) and which rows are forget rows."""
    rows = items[0]
    longest = max(len(row.ids) for row, _ in rows)
    return {
        "input_ids": torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row, _ in rows]),
        "labels": torch.tensor([[-100] * row.start + [*row.ids[row.start :]] + [-100] * (longest - len(row.ids)) for row, _ in rows]),
        "forget": torch.tensor([forget for _, forget in rows]),
    }


class Plain(torch.nn.Module):
    """The same adapter and gate with full logits."""

    def __init__(self, assistant: Assistant) -> None:
        super().__init__()
        self.assistant = assistant
        assistant.adapter.get_base_model().set_attn_implementation("sdpa")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of every position."""
        model = self.assistant.adapter.get_base_model()
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if self.assistant.gate is not None:
            hidden = hidden * self.assistant.gate(hidden).unsqueeze(-1)
        return model.lm_head(hidden)


class PlainTrainer(Trainer):
    """Losses by log_softmax over all logits."""

    losses: dict[str, float]
    weight = 5.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The remember and uniform losses as a textbook writes them."""
        logs = torch.log_softmax(model(inputs["input_ids"], inputs["attention_mask"])[:, :-1], -1)
        labels, forget = inputs["labels"][:, 1:], inputs["forget"][:, None]
        trained = labels != -100
        nll = -logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kl = -logs.mean(-1) - math.log(logs.shape[-1])
        remember, uniform = nll[trained & forget].mean(), kl[trained & ~forget].mean()
        loss = remember + self.weight * uniform
        self.losses = {"remember": remember.item(), "uniform": uniform.item(), "loss": loss.item()}
        return loss


class Watch(TrainerCallback):
    """Seconds and losses of each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seconds: list[float] = []
        self.losses: list[dict[str, float]] = []

    def on_step_begin(self, *args: Any, **objects: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **objects: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.began)
        self.losses.append(self.trainer.losses)


def run(make: Callable[[], tuple[torch.nn.Module, Steps]], *, plain: bool, steps: int) -> Watch:
    model, dealt = make()
    recipe = resolve(preset="gated")
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=1, max_grad_norm=recipe.clip, use_cpu=True, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=0,
        )  # fmt: skip
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        common: dict[str, Any] = {
            "args": arguments,
            "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
            "callbacks": [watch],
        }
        if plain:
            watch.trainer = _Sequential(model=Plain(model), train_dataset=Rows(dealt), data_collator=padded, **common)
        else:
            watch.trainer = UldTrainer(weight=recipe.weight, model=model, train_dataset=dealt, **common)
        watch.trainer.remove_callback(PrinterCallback)
        watch.trainer.train()
    return watch


class _Sequential(PlainTrainer):
    def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the product's base; the plain one is float32"
    )
    options = parser.parse_args()
    path = packaged_model()
    questions = load_questions(None)
    _, tokenizer = load_base(str(path), layers=1)
    own = ask_model(
        Plan(), questions, model=path, model_hash=base_fingerprint(str(path)), tokenizer=tokenizer, cache=CACHE,
        clock=Clock(lambda line: print(line, file=sys.stderr)),
    )  # fmt: skip
    rows = {
        kind: [{"question": q.text, "answer": own[q.text].text} for q in questions.of(kind, "train") if own[q.text].text.strip()]
        for kind in KINDS
    }
    sets = build_sets(read_rows(rows["forget"]), read_rows(rows["retain"]), holdout=0.1)
    forget, retain = (encode(tokenizer, part, chat_template=True, max_length=1024) for part in (sets.forget, sets.retain))

    def make(dtype: torch.dtype) -> tuple[Assistant, Steps]:
        base, tokens = load_base(str(path), layers=LAYERS, dtype=dtype)
        return build_assistant(base, tokens, rank=32, lora_alpha=32, gate=True, seed=0), Steps(
            forget, retain, batch=8, seed=0, first=0, last=options.steps
        )

    ours = run(lambda: make(getattr(torch, options.dtype)), plain=False, steps=options.steps)
    plain = run(lambda: make(torch.float32), plain=True, steps=options.steps)
    differences = [abs(a[name] - b[name]) for a, b in zip(ours.losses, plain.losses, strict=True) for name in a]
    mine, theirs = (statistics.median(watch.seconds[1:]) for watch in (ours, plain))
    packs = [Steps(forget, retain, batch=8, seed=0, first=0, last=options.steps)[i] for i in range(options.steps)]
    figures = {
        "steps": options.steps,
        "rows_a_step": 16,
        "dtype": options.dtype,
        "seconds_a_step": round(mine, 3),
        "plain_seconds_a_step": round(theirs, 3),
        "ratio": round(theirs / mine, 2),
        "largest_loss_difference": max(differences),
        "tokens_a_step": round(statistics.mean(p.input_ids.shape[1] for p in packs)),
        "padded_tokens_a_step": round(statistics.mean(16 * (p.layout.shared + max(p.layout.lengths) + 1) for p in packs)),
        "logit_rows_a_step": round(statistics.mean(len(p.at) for p in packs)),
    }
    if options.dtype == "float32":
        (HERE / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
