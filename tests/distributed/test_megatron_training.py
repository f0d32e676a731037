"""docs/megatron.md's code as printed, dp 2 x tp 2, is the step of one process; context ranks' tokens, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs megatron-core: make test-ranks")
from tests import ranks
from tests.distributed import megatron_training as training
from tests.distributed import sharded_models as models
from tests.distributed.megatron_training import CASES, MIXED, RATES

BOUND = 3e-6


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks.run(training.on_four, 4)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), atol=BOUND, rtol=BOUND)


@pytest.mark.parametrize("name", CASES)
def test_two_steps(found: list[dict[str, Any]], name: str) -> None:
    """Gradients, ESS / B of both micro-batches and all ranks, where parameters went, and the scheduler's rate afterwards."""
    for result in found:
        of = result[name]
        for got, want in zip(*of["ratios"], strict=True):
            close(got, want)
            assert 0.1 < float(want) < 0.99
        for got, want in zip(*of.get("gradients", ([], [])), strict=True):
            models.assert_close(got, want, BOUND)
        models.assert_close(*of["moved"], BOUND)
        assert ("gradients" in of) == (not CASES[name].distributed)
        for after, rate in zip(of["rates"], (RATES[1], 0.05), strict=True):  # the scheduler's, unscaled
            assert after == pytest.approx([rate] * len(after))


@pytest.mark.parametrize("name", MIXED)
def test_main_parameters(found: list[dict[str, Any]], name: str) -> None:
    for result in found:
        of = result[name]
        assert of["dtypes"] == {torch.float32}
        torch.testing.assert_close(of["ratio"].float(), of["wanted"], atol=2e-2, rtol=0.0)
        torch.testing.assert_close(of["moved"], of["whole"] * of["ratio"].float() ** 0.5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["context 2 x 2", "context 2 x 1", "context 4 x 1"])
def test_context_ranks(found: list[dict[str, Any]], name: str) -> None:
    """get_batch_on_this_cp_rank gives a rank two stretches of each sequence: segments do not care which."""
    for result in found:
        of = result[name]
        assert 0.1 < float(of["ess_ratio"][1]) < 0.99
        for got, want in of["gradients"]:
            assert float(want.abs().max()) > 1e-3
            torch.testing.assert_close(got, want, atol=BOUND * float(want.abs().max()), rtol=0.0)
        for field in ("ess_ratio", "baselines", "log_weights"):
            close(*of[field])
