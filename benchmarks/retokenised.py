"""The demo's topic forgotten across tokenizers, on a few questions: `python benchmarks/run.py retokenised`.

Two crossings, each beside a run in which both sides have one tokenizer. `remote`: the demo's assistant, with SmolLM2's tokens,
against SmolLM2 made to speak the tokens of another vocabulary. `small`: an assistant on a small model with byte-pair tokens of its
own, against SmolLM2; beside it the same small model with SmolLM2's tokens. Target: ROUGE-L within 0.05 of the run beside it.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs
from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.plain_tokenizer import PlainTokenizer
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_offset_models.assistant import SmallModel, base_fingerprint, load_base, load_base_tokenizer, real_rows
from uld_offset_models.scorer import Scorer
from uld_offset_models.tree_scorer import TreeScorer
from uld_sdk import UnlearnedClient
from uld_sdk.demo import job
from uld_sdk.demo.figures import Plan
from uld_sdk.demo.questions import KINDS, Question, load_questions
from uld_sdk.demo.server import packaged_model
from uld_sdk.evaluation.rouge import mean, rouge_l_recall

QUESTIONS, NEW, TOP, ROLLED = 5, 32, 20, 3
GREEDY = ServerSampling()


class Retokenised:
    """SmolLM2 as if it spoke another vocabulary's tokens: log s(c) of these, from trees of its own."""

    name = "retokenised"

    def __init__(self, model: SmallModel, vocabulary: Vocabulary, prompt: Sequence[int] = ()) -> None:
        self.model, self.vocabulary, self.prompt = model, vocabulary, list(prompt)
        self.tokenizer = PlainTokenizer(vocabulary)
        self.bridge = Bridge(vocabulary, Vocabulary.from_hf(model.tokenizer))
        self.scorer = TreeScorer([Scorer(model)])
        self.track = self.scorer.track()
        self.lock = threading.Lock()  # a stream that is cut off leaves its last pass running
        self.ends = {token for token, role in vocabulary.roles.items() if role is not Role.OTHER}

    def answering(self, messages: Sequence[Mapping[str, str]]) -> "Retokenised":
        """The same model about a conversation."""
        ids = self.model.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
        other = object.__new__(Retokenised)
        other.__dict__ |= self.__dict__ | {"prompt": list(ids), "track": self.scorer.track()}
        return other

    async def probe(self) -> Capabilities:
        """A local model can do everything."""
        return Capabilities(model="SmolLM2 in other tokens", top_logprobs=TOP, sampling=frozenset())

    def report(self, prefix: Sequence[int]) -> TopLogprobs:
        """The top tokens after a prefix of the answer."""
        with self.lock:
            return self._report(prefix)

    def _report(self, prefix: Sequence[int]) -> TopLogprobs:
        place, chain = self.bridge.start(), list(self.prompt)
        for token in prefix:
            certain, place = self.bridge.step(place, token)
            chain += certain
        known = len(self.track.tokens)
        if chain[:known] != self.track.tokens or (known == len(chain) and known not in self.track.states):
            self.track, known = self.scorer.track(), 0
        at, cover = len(chain), self.bridge.cover(place)
        nodes = self.scorer.read([(self.track, (chain[known:], [(at, path) for path in cover]))])[0]
        rows = {path: nodes[at, path].chances() for path in cover}
        candidates = self._candidates(place, rows, at)
        further = sorted(self.bridge.nodes(place, candidates, rows))
        found = self.scorer.read([(self.track, ((), [(at, path) for path in further]))])[0] if further else {}
        rows |= {path: found[at, path].chances() for path in further}
        shares = self.bridge.read(place, candidates, rows).now[0]
        with np.errstate(divide="ignore"):
            return TopLogprobs.build(candidates, np.log(shares / max(1.0, shares.sum()))).first(TOP)

    def _candidates(self, place: Any, rows: dict[Any, np.ndarray], at: int) -> list[int]:
        """What the likeliest tokens become in the other vocabulary: as they are, and after a few more."""
        own, control = self.bridge.small.path(place.tail), self.bridge.small.vocabulary.control
        best = np.argsort(-rows[own][0])[: 2 * TOP].tolist()
        texts = [self.bridge.small.tokens[token] for token in best if token not in control]
        rolled = [((*own, token), self.bridge.small.tokens[token]) for token in best[:ROLLED] if token not in control]
        for _ in range(ROLLED):
            nodes = self.scorer.read([(self.track, ((), [(at, path) for path, _ in rolled]))])[0] if rolled else {}
            following = [int(nodes[at, path].chances()[0].argmax()) for path, _ in rolled]
            rolled = [
                ((*path, token), text + self.bridge.small.tokens[token])
                for (path, text), token in zip(rolled, following, strict=True)
                if token not in control
            ]
            texts += [text for _, text in rolled]
        for overhang in self.bridge.small.overhangs(place.tail):
            chances = rows[overhang.path][0][overhang.ids]
            for token in overhang.ids[np.argsort(-chances)[:TOP]].tolist():
                texts.append(self.bridge.small.tokens[token][len(place.tail) - overhang.at :])
        found = [self.bridge.outcomes.of(place.remote_tail, text).now for text in texts if text]
        return list(dict.fromkeys([*(token for token in found if token >= 0), *self.bridge.control]))

    async def stream(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> AsyncGenerator[Draft]:
        """Token by token, each a piece of its own."""
        ids = list(prefix)
        for step in range(n):
            top = await asyncio.to_thread(self.report, ids)
            ids.append(int(top.ids[0]))
            ended = ids[-1] in self.ends
            yield Draft((ids[-1],), (top,), FinishReason.STOP if ended else FinishReason.LENGTH if step + 1 == n else None)
            if ended:
                return

    async def draft(self, prefix: Sequence[int], n: int, sampling: ServerSampling = GREEDY) -> Draft:
        """The stream as one piece."""
        pieces = [piece async for piece in self.stream(prefix, n, sampling)]
        return Draft(tuple(t for p in pieces for t in p.tokens), tuple(k for p in pieces for k in p.positions), pieces[-1].finish)

    async def score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Score:
        """Not asked for here."""
        raise NotImplementedError

    def resume(self, prefix: Sequence[int]) -> Sequence[int]:
        """The prefix itself."""
        return prefix

    async def aclose(self) -> None:
        """Nothing to close."""


def other_vocabulary(texts: Sequence[str], size: int) -> Any:
    """A byte-level tokenizer trained on a few texts, with SmolLM2's control tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=control, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=control[1], eos_token=control[2], additional_special_tokens=control[:1])
    made.chat_template = load_base_tokenizer(packaged_model()).chat_template
    return made


def small_base(folder: Path, tokenizer: Any, rows: Sequence[Mapping[str, str]], *, steps: int = 200) -> Path:
    """A small model trained from nothing on questions and answers, as a folder that `train` takes for its base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **sizes))
    turns = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    ids = [tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"][:256] for turn in turns]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = [torch.tensor(ids[int(i)]) for i in rng.integers(0, len(ids), 8)]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        loss = model(input_ids=padded, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(options: dict[str, Any], questions: Sequence[Question]) -> dict[str, float]:
    """ROUGE-L of the answers through the assistant against those without it, and the share of answers that stayed."""
    plain = {key: value for key, value in options.items() if not key.startswith("assistant")}
    with UnlearnedClient(**plain) as before, UnlearnedClient(**options) as after:
        found = [[client.generate(question.text, max_new_tokens=NEW) for question in questions] for client in (before, after)]
    pairs = list(zip(*found, strict=True))
    return {
        "rouge": round(mean(rouge_l_recall(old.text, new.text) for old, new in pairs), 3),
        "identical": round(mean(float(old.text == new.text) for old, new in pairs), 3),
        "untouched": round(mean(new.report.untouched / new.report.positions for _, new in pairs), 3),
        "largest_bound": round(max(new.report.largest_bound for _, new in pairs), 3),
    }


def measure(work: Path) -> dict[str, Any]:
    """Both crossings, each beside its run with one tokenizer."""
    work = work / "retokenised"
    work.mkdir(parents=True, exist_ok=True)
    path, questions, plan = packaged_model(), load_questions(), Plan(layers=6)
    clock = job.Clock(lambda line: print(f"  {line}", flush=True))
    own = job.ask_model(
        plan, questions, model=path, model_hash=base_fingerprint(path), tokenizer=load_base_tokenizer(path),
        cache=work.parent / "own_answers.json", clock=clock,
    )  # fmt: skip
    rows = [row for kind in KINDS for row in job.training_rows(questions, own, kind)]
    texts = [text for row in rows for text in row.values()]
    base, tokenizer = load_base(path)
    model = SmallModel(base.base_model, real_rows(base, tokenizer), None, tokenizer)
    served = {"backend": "hf", "model": base, "tokenizer": tokenizer, "top_logprobs": TOP}
    other = other_vocabulary(texts, 2000)
    job.train_assistant(plan, questions, own, model=path, output=work / "assistant", preset="gated")
    for name, tokens in (("own", other), ("shared", tokenizer)):
        folder = small_base(work / f"base-{name}", tokens, rows)
        job.train_assistant(plan, questions, own, model=folder, output=work / f"assistant-{name}", preset="gated", layers=4)
    runs = {
        "remote, one tokenizer": {**served, "assistant": work / "assistant", "assistant_base": path},
        "remote, another's tokens": {
            "backend": Retokenised(model, Vocabulary.from_hf(other)), "assistant": work / "assistant", "assistant_base": path,
        },
        "small, one tokenizer": {**served, "assistant": work / "assistant-shared"},
        "small, tokens of its own": {**served, "assistant": work / "assistant-own"},
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, options in runs.items():
        found[name] = {kind: asked(options, questions.of(kind, "holdout")[:QUESTIONS]) for kind in KINDS}
        print(name, found[name], flush=True)
    return {"runs": found, "questions": QUESTIONS, "new_tokens": NEW}
