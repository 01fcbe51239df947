"""SmolLM2 made to speak the tokens of another vocabulary, as a backend."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np

from uld_adapters.backend import Capabilities, ServerSampling
from uld_adapters.logprobs import Draft, FinishReason, Score, TopLogprobs
from uld_adapters.vocabulary.bridge import Bridge
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.plain_tokenizer import PlainTokenizer
from uld_adapters.vocabulary.tokens import Vocabulary
from uld_offset_models.assistant import SmallModel
from uld_offset_models.scorer import Scorer
from uld_offset_models.tree_scorer import TreeScorer

TOP, ROLLED = 20, 3
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
        self.reports: dict[tuple[int, ...], TopLogprobs] = {}  # by the prompt and the answer so far: runs share many prefixes
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
        asked = (*self.prompt, -1, *prefix)
        with self.lock:
            if asked not in self.reports:
                self.reports[asked] = self._report(prefix)
            return self.reports[asked]

    def _report(self, prefix: Sequence[int]) -> TopLogprobs:
        place, chain = self.bridge.start(), list(self.prompt)
        for token in prefix:
            certain, place = self.bridge.step(place, token)
            chain += certain
        pairs = zip(chain, self.track.tokens, strict=False)
        known = next((at for at, (mine, read) in enumerate(pairs) if mine != read), min(len(chain), len(self.track.tokens)))
        self.track.rollback(known)
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
