"""The README's use in ten lines runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch


def test_readme_loop_runs() -> None:
    text = Path("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    table = torch.nn.Embedding(11, 11)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table(ids))

    logged: list[dict[str, torch.Tensor]] = []
    batch = (torch.randint(0, 11, (16, 6)), torch.ones(16, 6), torch.full((16, 6), -2.4), torch.rand(16))
    before = table.weight.detach().clone()
    exec(code, {"torch": torch, "model": Model(), "rollouts": [batch, batch], "log": logged.append})
    assert len(logged) == 2
    assert logged[0]["vcpo/num_tokens"] == 16 * 5  # the first token of each row has no prediction
    assert not torch.equal(table.weight, before)
