"""The README's code runs as printed, and docs/usage.md's after it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch


def test_readme_loop_runs() -> None:
    text = Path("README.md").read_text() + Path("docs/usage.md").read_text()
    loop, head, micro_batches, two_phases, exact, objective = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.table(ids)))

    model = Model()
    logged: list[dict[str, torch.Tensor]] = []
    batch = (torch.randint(0, 11, (16, 6)), torch.ones(16, 6), torch.full((16, 6), -2.4), torch.rand(16))
    before = model.head.weight.detach().clone()
    names = {"torch": torch, "model": model, "rollouts": [batch, batch], "log": logged.append}
    exec(loop, names)
    assert len(logged) == 2
    assert logged[0]["vcpo/num_tokens"] == 16 * 5  # the first token of each row has no prediction
    assert not torch.equal(model.head.weight, before)

    gradients = []
    for code in (head, micro_batches, two_phases):  # the same batch, the same weights
        model.zero_grad()
        exec(code, names)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for whole, *split in zip(*gradients, strict=True):
        for of_parts in split:
            torch.testing.assert_close(of_parts, whole)

    model.zero_grad()
    exec(exact, names)
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    exec(head.replace("8, vk.Segments.padded(mask)", "8, segments, config"), names)
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)

    model.zero_grad()
    exec(head.split("out =")[0] + objective, names)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.head.weight.grad.abs().max() > 0
