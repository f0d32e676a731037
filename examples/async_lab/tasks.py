"""The tasks: prompts, right answers and a verifiable reward, in a table.

Adding one is a subclass of `Task` and a line in `TASKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Task(ABC):
    """Fixed-length prompts with one right answer each, which is what supervision and the reward compare with.

    vocabulary, prompt_length, answer_length: sizes in tokens.
    """

    vocabulary: int
    prompt_length: int
    answer_length: int

    @abstractmethod
    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw prompts, [count, prompt_length]."""

    @abstractmethod
    def answers(self, prompts: Tensor) -> Tensor:
        """The right answer to each prompt, [count, answer_length]."""

    def correct(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Fraction of each response's tokens that are right, [count]."""
        return (responses == self.answers(prompts)).float().mean(-1)

    def rewards(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """R_i of each response, [count]."""
        return self.correct(prompts, responses)


class Sort(Task):
    """Sort `digits` random digits: "5 2 9 |" is answered by "2 5 9". Reward: the fraction of places right."""

    def __init__(self, digits: int = 12) -> None:
        self.vocabulary = 11  # ten digits and the separator
        self.separator = 10
        self.prompt_length = digits + 1
        self.answer_length = digits

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        digits = torch.randint(10, (count, self.answer_length), generator=generator)
        return torch.cat([digits, torch.full((count, 1), self.separator)], 1)

    def answers(self, prompts: Tensor) -> Tensor:
        return prompts[:, :-1].sort(-1).values


TASKS: dict[str, Task] = {"sort": Sort()}
