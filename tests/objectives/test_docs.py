"""docs/objectives.md: its code runs as printed, in order, and its table names what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vcpo_kernels.objectives import ADVANTAGES, OBJECTIVES

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_code_runs() -> None:
    first, controls, own = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["logits"].grad.any()
    before = names["logits"].detach().clone()
    exec(controls, names)
    assert 0 < names["rate"].ratio < 1
    assert not torch.equal(names["parameter"], before)
    assert names["optimizer"].param_groups[0]["lr"] == 1e-2

    names["behavior_logp"] = names["behavior_logp"].clone()
    names["behavior_logp"][0, 0] -= 3.0  # a token whose square root of the ratio passes the limit
    exec(own, names)
    out, stats, advantages = names["out"], names["stats"], names["advantages"]
    weights = ((stats.logp.detach() - names["behavior_logp"]) / 2).exp().clamp(max=2.0)
    torch.testing.assert_close(out.coefficients, weights * advantages[:, None] / 48)
    torch.testing.assert_close(out.metrics["truncated_fraction"], torch.tensor(1 / 48))


def test_tables_name_what_there_is() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(OBJECTIVES) <= named
    assert {entry.function.__name__ for entry in ADVANTAGES.values()} <= named
