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
        """How right each response is, in [0, 1]: [count]. Here the fraction of its tokens."""
        return (responses == self.answers(prompts)).float().mean(-1)

    def rewards(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """R_i of each response, [count]: what can be verified."""
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


class Add(Task):
    """Add two numbers of `digits` digits, place by place, then write the sum: "7 8 + 4 6 =" by "4 1 2 1 1 2 4".

    The scratchpad has, from the ones upwards, the digit and the carry of each place; the sum follows, highest place
    first. Reward: 1 where the sum is right in every digit, else 0, whatever the scratchpad says, so that it pays only
    as a way of getting there.
    """

    def __init__(self, digits: int = 4) -> None:
        self.digits = digits
        self.vocabulary = 12  # ten digits, "+" and "="
        self.plus, self.equals = 10, 11
        self.prompt_length = 2 * digits + 2
        self.answer_length = 2 * digits + digits + 1

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        digits = torch.randint(10, (count, 2 * self.digits), generator=generator)
        plus, equals = (torch.full((count, 1), token) for token in (self.plus, self.equals))
        return torch.cat([digits[:, : self.digits], plus, digits[:, self.digits :], equals], 1)

    def answers(self, prompts: Tensor) -> Tensor:
        first, second = prompts[:, : self.digits], prompts[:, self.digits + 1 : -1]
        carry = torch.zeros(len(prompts), dtype=torch.int64)
        scratchpad: list[Tensor] = []
        total: list[Tensor] = []
        for place in reversed(range(self.digits)):
            added = first[:, place] + second[:, place] + carry
            carry = added // 10
            scratchpad += [added % 10, carry]
            total.insert(0, added % 10)
        return torch.stack([*scratchpad, carry, *total], 1)

    def correct(self, prompts: Tensor, responses: Tensor) -> Tensor:
        right = responses == self.answers(prompts)
        return right[:, 2 * self.digits :].all(-1).float()


TASKS: dict[str, Task] = {"sort": Sort(), "add": Add()}
