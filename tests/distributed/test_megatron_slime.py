"""slime's loss and hook on Megatron's tensor, context and data ranks are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs megatron-core: make test-ranks")
from tests import ranks
from tests.distributed import slime_on_megatron
from tests.distributed.slime_on_megatron import LAYOUTS


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks.run(slime_on_megatron.on_four, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step(found: list[dict[str, Any]], layout: str) -> None:
    """d logits, metrics and the step's ESS; one gather over tensor ranks, one sum of sequences over context ranks."""
    tp, cp = LAYOUTS[layout]
    for result in found:
        of = result[layout]
        got, want = of["gradient"]
        torch.testing.assert_close(got, want, atol=3e-6 * float(want.abs().max()), rtol=2e-4)  # slime's logits are fp32
        torch.testing.assert_close(*of["sums"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of["ratio"][0], of["ratio"][1].double(), rtol=1e-5, atol=0.0)
        assert of["called"] == ["all_gather"] * (tp > 1) + ["all_reduce"] * (cp > 1)


def test_what_is_refused(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["before"].startswith(
            "megatron.ranks: Megatron has no process groups yet. Call it after megatron.core"
        )
        assert (
            "allgather_cp=True cannot be honoured with context_parallel_size > 1: a rank's logits" in result["refused"]
        )
        assert "must have as many torch optimizers inside Namespace as each other, got [1, 1, 1, 2]" in result["uneven"]
