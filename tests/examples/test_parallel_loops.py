"""The loops of FSDP2, tensor and context parallelism: two ranks end with the parameters, and the ESS, of one process."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests import ranks
from tests.docs.pages import commands

pytest.importorskip("transformers", reason="the FSDP2 loop's model is Hugging Face's: pip install transformers")
from examples.loops import launch

LOOPS = ("fsdp2", "tensor_parallel", "context_parallel")
BOUND = 2e-6


def of_loop(name: str) -> dict[str, Any]:
    model, history = importlib.import_module(f"examples.loops.{name}").train()
    own = {n: tuple(p.to_local().shape if hasattr(p, "to_local") else p.shape) for n, p in model.named_parameters()}
    return {"model": launch.whole_state(model), "history": history, "own": own}


def on_ranks(rank: int) -> dict[str, Any]:
    return {name: of_loop(name) for name in LOOPS}


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(on_ranks, 2)


@pytest.mark.parametrize("name", LOOPS)
def test_two_ranks_are_one_process(of_two: list[dict[str, Any]], name: str) -> None:
    want = of_loop(name)
    assert len(want["history"]) == 4
    for result in of_two:
        got = result[name]
        for parameter, values in want["model"].items():
            assert float((got["model"][parameter] - values).abs().max()) <= BOUND, parameter
        for step, step_of_one in zip(got["history"], want["history"], strict=True):
            assert step == pytest.approx(step_of_one, rel=1e-5)
            assert 0 < step["ess_ratio"] < 1
            assert step["scale"] == pytest.approx(step["ess_ratio"] ** 0.5)


def test_what_the_ranks_share(of_two: list[dict[str, Any]]) -> None:
    """Parameters of FSDP2 and of the vocabulary are in parts; context parallelism has each of them whole."""
    for result in of_two:
        assert result["fsdp2"]["own"]["lm_head.weight"] == (32, 32)
        shapes = result["tensor_parallel"]["own"]
        assert (shapes["head.weight"], shapes["table.weight"], shapes["norm.weight"]) == ((32, 32), (32, 32), (32,))
        assert (shapes["blocks.0.attention.q.weight"], shapes["blocks.0.attention.o.weight"]) == ((16, 32), (32, 16))
        assert result["context_parallel"]["own"]["head.weight"] == (64, 32)


def test_the_page_names_each_loop() -> None:
    """Its commands are run by tests/docs."""
    printed = [command.text for command in commands("docs/parallel.md")]
    for name in LOOPS:
        assert f"python -m examples.loops.{name}" in printed
        assert any(text.startswith(f"torchrun --nproc-per-node 2 -m examples.loops.{name}") for text in printed)
