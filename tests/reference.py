"""A slow, obviously right decode loop: one token at a time, everything recomputed, no cache, no draft, no shortcut.

It shares no code with the client but the random numbers that (seed, position) stand for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from uld_sdk.sampling import gumbel


@dataclass
class Reference:
    """`target` and `small` are whole models; `head`, `gate`, `alpha`, `margin`, `ratio` are the method's."""

    target: torch.nn.Module
    backbone: torch.nn.Module
    head: torch.Tensor
    gate: Callable[[torch.Tensor], torch.Tensor] | None
    ends: frozenset[int]
    k: int | None
    alpha: float = 0.75
    margin: float = 3.0
    ratio: float = 0.01
    resume: Callable[[list[int]], Sequence[int] | None] = field(default=lambda ids: ids)

    @torch.no_grad()
    def target_logprobs(self, ids: list[int]) -> np.ndarray:
        return torch.log_softmax(self.target(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()

    @torch.no_grad()
    def excess(self, ids: list[int]) -> np.ndarray:
        hidden = self.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
        logits = (self.head @ hidden).double()
        if self.gate is not None:
            logits = logits * self.gate(hidden).double()
        return (torch.log_softmax(logits, -1) + math.log(len(self.head))).numpy()

    def ranking(self, log_p: np.ndarray, excess: np.ndarray, *, temperature: float, seed: int, position: int) -> tuple[list[int], bool]:
        order = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))[: self.k]
        touched = excess.max() > self.margin
        score = {v: log_p[v] for v in order}
        if touched:
            floor = log_p[order[0]] + math.log(self.ratio)
            score = {v: log_p[v] - self.alpha * max(0.0, excess[v] - self.margin) for v in order if log_p[v] >= floor}
        if temperature:
            noise = gumbel(seed, position, np.arange(len(log_p)))
            total = np.logaddexp.reduce(list(score.values()))
            score = {v: (value - total) / temperature + noise[v] for v, value in score.items()}
        return sorted(score, key=lambda v: (-score[v], v)), touched

    def generate(
        self, prompt: list[int], small_prompt: list[int], n: int, *, temperature: float = 0.0, seed: int = 0
    ) -> tuple[list[int], int]:
        """Token ids of the answer, and how many positions were touched."""
        answer: list[int] = []
        head, covered = list(prompt), 0  # what the server sees as the prompt and the first tokens of the answer
        touched_positions = 0
        position = 0
        while position < n and not (answer and answer[-1] in self.ends):
            seen = [*head, *answer[covered:]]
            log_p = self.target_logprobs(seen)
            ranked, touched = self.ranking(log_p, self.excess(small_prompt + answer), temperature=temperature, seed=seed, position=position)
            touched_positions += touched
            own = int(log_p.argmax())
            for token in ranked:
                if (token == own and (token == ranked[0] or not touched)) or token in self.ends:
                    answer.append(token)
                    break
                resumed = None if token == own else self.resume([*seen, token])
                if resumed is None:
                    continue
                answer.append(token)
                if list(resumed[: len(head)]) == head:
                    answer = [*answer[:covered], *resumed[len(head) :]]
                else:
                    head, covered = list(resumed), len(answer)
                break
            position += 1
        return answer, touched_positions
