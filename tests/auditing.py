"""Decisions of the decode loop written down as they are made, and each compared with slow passes over all that stands before it."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from uld_adapters.emulator.desk import Desk
from uld_adapters.errors import BackendError
from uld_adapters.logprobs import TopLogprobs
from uld_offset_models.assistant import SmallModel
from uld_offset_models.shift import Rule
from uld_sdk.generation import Answer
from uld_sdk.sampling import process

CLOSE = 1e-3  # nats between a cached pass and a fresh one
ROUNDING = 1e-4  # nats, too, where it decides between tokens


@dataclass(frozen=True)
class Decision:
    """What one position was decided from: the server's prefix, the answer that the small model has read, the draft, what was drawn."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    drafted: int
    noise: tuple[np.ndarray, ...]  # Gumbel noise
    chance: float | None  # uniform


class Audited(Answer):
    """An answer that writes down its decisions, one a step of its trace."""

    drawn: ClassVar[list[Any]] = []  # noted by `Audit.listen`

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.decisions: list[Decision] = []
        self.lost = 0

    async def _decide(self, drafted: int, top: TopLogprobs, reading: Any) -> Any:
        prefix, tokens = tuple(self.written.prefix), tuple(self.written.tokens)
        self.drawn.clear()
        outcome = await super()._decide(drafted, top, reading)
        noise = tuple(value for value in self.drawn if isinstance(value, np.ndarray))
        chance = next((value for value in self.drawn if isinstance(value, float)), None)
        self.decisions.append(Decision(prefix, tokens, drafted, noise, chance))
        return outcome

    async def _judged(self, drafted: int, top: TopLogprobs, reading: Any) -> Any:
        try:  # only a raw report that is asked for again can be lost here
            return await super()._judged(drafted, top, reading)
        except BackendError:
            self.lost += 1
            raise


class Audit:
    """The truth about every position: the target's log p and the small model's excess, out of passes without a cache."""

    def __init__(self, target: Path, small: SmallModel, rule: Rule, k: int) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.small, self.rule, self.k = small, rule, k
        self.sent: set[tuple[tuple[int, ...], int]] = set()  # what the server wrote after which ids
        self.counted: Counter[str] = Counter()
        self._rows: dict[tuple[bool, tuple[int, ...]], np.ndarray] = {}

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Write down what the emulator writes, and what noise the client draws."""
        write, generator = Desk.write, np.random.default_rng

        async def written(desk: Desk, request: Any, prompt: list[int], *given: Any) -> AsyncIterator[Any]:
            ids = list(prompt)
            async for step in write(desk, request, prompt, *given):
                self.sent.add((tuple(ids), step.token))
                ids.append(step.token)
                yield step

        class Noted:
            def gumbel(self, *, size: int) -> np.ndarray:
                Audited.drawn.append(generator().gumbel(size=size))
                return Audited.drawn[-1]

            def random(self) -> float:
                Audited.drawn.append(generator().random())
                return Audited.drawn[-1]

        monkeypatch.setattr(Desk, "write", written)
        monkeypatch.setattr(np.random, "default_rng", lambda seed=None: Noted() if seed is None else generator(seed))

    def check(self, answer: Audited) -> None:
        """Compare every decision of an answer, a broken one included."""
        assert answer.reader is not None
        prompt = tuple(answer.reader.prompt)
        self.counted["lost while asking again"] += answer.lost
        for made, step in reversed(list(zip(answer.decisions, answer.steps, strict=True))):
            excess = self._row(prompt + made.tokens, of_target=False)
            peak = float(excess.max())
            assert step.peak is not None
            if abs(peak - self.rule.margin) > CLOSE:
                assert step.touched == (peak > self.rule.margin)
            if not step.touched:
                self.counted["untouched"] += 1
                assert step.peak > peak - CLOSE  # an upper bound is enough here
                assert step.token_id == step.remote_id == made.drafted
            else:
                self.counted["touched"] += 1
                assert abs(step.peak - peak) < CLOSE
                self._redrawn(answer, made, step.token_id, excess)
            assert (made.prefix, made.drafted) in self.sent

    def _redrawn(self, answer: Audited, made: Decision, token: int, excess: np.ndarray) -> None:
        """A touched position's token is the method's own, or that of log-probabilities no further off than rounding takes them."""
        log_p = self._row(made.prefix, of_target=True)
        if token not in self._method(answer, made, log_p, excess):
            counted = self.counted + Counter({"within rounding": 1})
            off = np.random.default_rng(0).uniform(-ROUNDING, ROUNDING, (64, 2, len(log_p)))
            assert any(token in self._method(answer, made, log_p + one, excess + other) for one, other in off)
            self.counted = counted  # the position counts once

    def _method(self, answer: Audited, made: Decision, log_p: np.ndarray, excess: np.ndarray) -> list[int]:
        """The method in plain words: the token is the draft if chance has it so, else drawn from what q has beyond it.

        All candidates where that cannot be told, none where the noise was not drawn for these.
        """
        reported = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))[: self.k]
        floor = log_p[reported[0]] + np.log(self.rule.filter)
        score = {v: log_p[v] - self.rule.alpha * max(0.0, excess[v] - self.rule.margin) for v in reported if log_p[v] >= floor}
        if answer.capabilities.processed and list(answer.backend.resume(made.prefix) or ()) != list(made.prefix):
            return list(score)  # nobody could ask again here: the cuts of the server's own sampling stay
        ids = sorted(score, key=lambda v: (-score[v], v))
        if len(ids) != len(made.noise[0]) or (made.chance is not None and made.drafted not in score):
            return []
        values = np.array([score[v] for v in ids])
        drawn = process(values - np.logaddexp.reduce(values), answer.settings.sampling)
        ranking = [ids[i] for i in np.argsort(-(drawn + made.noise[0]), kind="stable") if np.isfinite(drawn[i])]
        if made.chance is not None or len(made.noise) > 1:
            order = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))
            p_draft = np.zeros(len(log_p))
            p_draft[order] = np.exp(process(log_p[order], answer.settings.sampling))
            if made.chance is not None and made.chance < np.exp(drawn[ids.index(made.drafted)]) / p_draft[made.drafted]:
                self.counted["draft stands"] += 1
                ranking = [made.drafted]
            else:
                self.counted["draft falls"] += 1
                beyond = np.exp(drawn) - p_draft[ids]
                more = [ids[i] for i in np.argsort(-(np.log(np.maximum(beyond, 1e-12)) + made.noise[1])) if beyond[i] > 1e-6]
                ranking = more + [v for v in ranking if v not in more]
        may = [v for v in ranking if (v == ranking[0] if v == made.drafted else self._sendable(answer, made, v))]
        return may[:1]

    def _sendable(self, answer: Audited, made: Decision, token: int) -> bool:
        return token in answer.end_ids or answer.backend.resume([*made.prefix, token]) is not None

    @torch.no_grad()
    def _row(self, ids: tuple[int, ...], *, of_target: bool) -> np.ndarray:
        """Log p or excess after these ids; one fresh pass gives it for every beginning of them."""
        if (of_target, ids) not in self._rows:
            given = torch.tensor([ids])
            if of_target:
                rows = torch.log_softmax(self.target(given).logits[0].double(), -1)
            else:
                rows = torch.log_softmax(self.small.logits(self.small.backbone(given).last_hidden_state)[0].double(), -1)
                rows += np.log(rows.shape[-1])
            for at, row in enumerate(rows.numpy(), start=1):
                self._rows[of_target, ids[:at]] = row
        return self._rows[of_target, ids]
