"""The demo's topic forgotten across tokenizers: `python benchmarks/run.py retokenised`.

The assistant is made of the first layers of SmolLM2, with SmolLM2's tokens or with byte-pair tokens of its own (`own_tokens.py`): the
same layers, rows and steps, so that the tokens are all that differs. So is the remote: SmolLM2, or SmolLM2 made to speak those other
tokens (`retokenised_remote.py`, slow). A comparison is paired by question and seed of the training; target: ROUGE-L within 0.05.

A token can lose at most alpha (ln |B| - tau) nats, which at one alpha is less in a small vocabulary: .75 (10.8 - 3) with SmolLM2's
49152 tokens, .75 (7.6 - 3) with 2000. Training therefore gives an assistant of few tokens a larger alpha (`Recipe.strength`); beside it
stands a run at the alpha of the other assistant. Both were looked at once on the held-out questions of the first seed before that was so.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
from own_tokens import own_base, own_vocabulary
from retokenised_remote import TOP, Retokenised

from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.shares import excess
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_offset_models.assistant import SmallModel, base_fingerprint, load_base, load_base_tokenizer, real_rows
from uld_offset_models.loading import load_artifact
from uld_offset_models.scorer import Scorer
from uld_offset_models.tree_scorer import TreeScorer
from uld_sdk import UnlearnedClient
from uld_sdk.demo import job
from uld_sdk.demo.figures import Plan
from uld_sdk.demo.questions import KINDS, Kind, Question, Questions, load_questions
from uld_sdk.demo.server import packaged_model
from uld_sdk.evaluation.rouge import mean, rouge_l_recall

ASKED = {"forget": 24, "retain": 20}
FEW, NEW, SIZE, SEEDS = 5, 32, 2000, (0, 1)
ONE, OWN, WEAK = "one tokenizer", "small, tokens of its own", "small, tokens of its own, alpha of the other"
REMOTE, BOTH = "remote, another's tokens", "both, another's tokens"
COMPARED = ((OWN, ONE), (WEAK, ONE), (REMOTE, ONE), (OWN, BOTH))


@dataclass(frozen=True)
class Asking:
    """One run: a client's options, and which training's assistant it has."""

    name: str
    options: dict[str, Any]
    seed: int
    few: bool = False


def spread(rows: Sequence[Question], count: int) -> list[Question]:
    """As many of the rows, evenly spaced."""
    return [rows[index * len(rows) // count] for index in range(count)]


def chosen(questions: Questions, kind: Kind, *, few: bool) -> list[Question]:
    """The held-out questions that are asked; the few are some of them."""
    rows = spread(questions.of(kind, "holdout"), ASKED[kind])
    return spread(rows, FEW) if few else rows


class Plain:
    """The remotes' own answers, asked once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], str] = {}

    def answers(self, options: dict[str, Any], rows: Sequence[Question]) -> list[str]:
        """Without an assistant."""
        remote = {key: value for key, value in options.items() if not key.startswith(("assistant", "alpha"))}
        place = str(type(options["backend"]))
        if missing := [row.text for row in rows if (place, row.text) not in self.known]:
            with UnlearnedClient(**remote) as client:
                self.known |= {(place, text): client.generate(text, max_new_tokens=NEW).text for text in missing}
        return [self.known[place, row.text] for row in rows]


def asked(run: Asking, rows: Sequence[Question], plain: Plain) -> list[dict[str, Any]]:
    """Each question's answer through the assistant, against the one without it."""
    before = plain.answers(run.options, rows)
    with UnlearnedClient(**run.options) as client:
        after = [client.generate(row.text, max_new_tokens=NEW) for row in rows]
    return [
        {
            "question": row.text, "seed": run.seed, "rouge": rouge_l_recall(old, new.text), "identical": float(old == new.text),
            "untouched": new.report.untouched / new.report.positions, "largest_bound": new.report.largest_bound,
            "alignment": new.report.alignment,
        }
        for row, old, new in zip(rows, before, after, strict=True)
    ]  # fmt: skip


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run's figures of one set; `by_seed` has the ROUGE-L of each training."""
    seeds = sorted({row["seed"] for row in found})
    return {
        **{key: round(mean(row[key] for row in found), 3) for key in ("rouge", "identical", "untouched")},
        "largest_bound": round(max(row["largest_bound"] for row in found), 3),
        "by_seed": [round(mean(row["rouge"] for row in found if row["seed"] == seed), 3) for seed in seeds],
        "answers": len(found),
        "alignment": found[0]["alignment"],
    }


def compared(mine: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The difference of two runs' ROUGE-L on the questions and seeds that both have, with its standard error."""
    beside = {(row["question"], row["seed"]): row["rouge"] for row in other}
    pairs = [(row["rouge"], beside[row["question"], row["seed"]]) for row in mine if (row["question"], row["seed"]) in beside]
    differences = [a - b for a, b in pairs]
    return {
        "rouge": [round(mean(side), 3) for side in zip(*pairs, strict=True)],
        "difference": round(mean(differences), 3),
        "standard_error": round(stdev(differences) / math.sqrt(len(differences)), 3),
        "pairs": len(pairs),
    }


def said_of(folder: Path, tokenizer: Any, texts: dict[str, str]) -> dict[str, float]:
    """What an assistant takes from the remote's own answers, in its own tokens and through the bridge from the remote's, in nats.

    `shift` is the sum of max(0, excess - tau) over the tokens of all the answers, `logprob` that of log p_a and of log s_a.
    """
    artifact = load_artifact(folder)
    tokens, margin, rows = artifact.tokenizer, artifact.manifest.margin, len(artifact.small.head)
    scorer, bridge = TreeScorer([Scorer(artifact.small)]), Bridge(Vocabulary.from_hf(tokenizer), Vocabulary.from_hf(tokens))
    found = {"own_logprob": 0.0, "bridge_logprob": 0.0, "own_shift": 0.0, "bridge_shift": 0.0}
    for question, answer in texts.items():
        turn = [{"role": "user", "content": question}]
        prompt = list(tokens.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
        own, theirs = (side(answer, add_special_tokens=False)["input_ids"] for side in (tokens, tokenizer))
        nodes = scorer.read([(scorer.track(), (prompt + own[:-1], [(len(prompt) + at, ()) for at in range(len(own))]))])[0]
        for at, token in enumerate(own):
            logprob = math.log(nodes[len(prompt) + at, ()].chances()[0, token])
            found["own_logprob"] += logprob
            found["own_shift"] += max(0.0, logprob + math.log(rows) - margin)
        place, track, waiting = bridge.start(), scorer.track(), prompt
        for token in theirs:
            at, cover = len(track.tokens) + len(waiting), bridge.cover(place)
            found_now = scorer.read([(track, (waiting, [(at, path) for path in cover]))])[0]
            chances = {path: found_now[at, path].chances() for path in cover}
            further = sorted(bridge.nodes(place, [token], chances, ahead=[token]))
            more = scorer.read([(track, ((), [(at, path) for path in further]))])[0] if further else {}
            shares = bridge.read(place, [token], chances | {path: more[at, path].chances() for path in further})
            found["bridge_logprob"] += float(np.log(shares.now[0, 0]))
            found["bridge_shift"] += max(0.0, float(excess(shares)[0, 0]) - margin)
            certain, place = bridge.step(place, token)
            waiting = list(certain)
    return {key: round(value, 1) for key, value in found.items()}


def measure(work: Path) -> dict[str, Any]:
    """All runs, and each beside the run of one tokenizer."""
    work = work / "retokenised"
    work.mkdir(parents=True, exist_ok=True)
    path, questions, plan = packaged_model(), load_questions(), Plan(layers=6)
    clock = job.Clock(lambda line: print(f"  {line}", flush=True))
    own = job.ask_model(
        plan, questions, model=path, model_hash=base_fingerprint(path), tokenizer=load_base_tokenizer(path),
        cache=work.parent / "own_answers.json", clock=clock,
    )  # fmt: skip
    rows = [row for kind in KINDS for row in job.training_rows(questions, own, kind)]
    base, tokenizer = load_base(path)
    other = own_vocabulary([text for row in rows for text in row.values()], SIZE, path)
    folder = own_base(work / "base", other, path, layers=6)
    losses: dict[str, list[dict[str, float]]] = {"one": [], "own": []}
    alphas: dict[str, float] = {}
    for seed in SEEDS:
        for side, made in (("one", path), ("own", folder)):
            trained = job.train_assistant(plan, questions, own, model=made, output=work / f"{side}-{seed}", preset="gated", seed=seed)
            alphas[side] = trained.manifest.alpha
            losses[side].append({key: round(trained.history[-1][key], 4) for key in ("remember", "uniform", "retain_untouched")})
    model = SmallModel(base.base_model, real_rows(base, tokenizer), None, tokenizer)
    served = {"backend": "hf", "model": base, "tokenizer": tokenizer, "top_logprobs": TOP}
    slow = {"backend": Retokenised(model, Vocabulary.from_hf(other))}
    runs = [
        *(Asking(ONE, {**served, "assistant": work / f"one-{seed}", "assistant_base": path}, seed) for seed in SEEDS),
        *(Asking(OWN, {**served, "assistant": work / f"own-{seed}"}, seed) for seed in SEEDS),
        Asking(WEAK, {**served, "assistant": work / "own-0", "alpha": alphas["one"]}, 0),
        Asking(REMOTE, {**slow, "assistant": work / "one-0", "assistant_base": path}, 0),
        Asking(BOTH, {**slow, "assistant": work / "own-0"}, 0, few=True),
    ]
    plain, found = Plain(), {run.name: {kind: [] for kind in KINDS} for run in runs}
    for run in runs:
        for kind in KINDS:
            found[run.name][kind] += asked(run, chosen(questions, kind, few=run.few), plain)
            print(f"  {run.name}, seed {run.seed}, {kind}: {json.dumps(summary(found[run.name][kind]))}", flush=True)
    forget = chosen(questions, "forget", few=False)
    texts = dict(zip([row.text for row in forget], plain.answers(served, forget), strict=True))
    return {
        "runs": {name: {kind: summary(each) for kind, each in kinds.items()} for name, kinds in found.items()},
        "compared": [
            {"run": mine, "beside": beside, "questions": kind, **compared(found[mine][kind], found[beside][kind])}
            for mine, beside in COMPARED
            for kind in KINDS
        ],
        "said": {f"seed {seed}": said_of(work / f"own-{seed}", tokenizer, texts) for seed in SEEDS},
        "losses": losses,
        "alphas": alphas, "new_tokens": NEW, "vocabulary": len(other), "few": FEW,
    }  # fmt: skip
