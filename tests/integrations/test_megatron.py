"""Rates on the torch optimizers inside of Megatron's, without Megatron. With it: tests/distributed/megatron_training.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vcpo_kernels.integrations import megatron


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_every_inner_optimizer_has_a_rate() -> None:
    """Of a chain all, of a wrapper the wrapped one, of a stub none."""
    dense, experts = optimizer(), optimizer()
    chain = SimpleNamespace(
        chained_optimizers=[
            SimpleNamespace(optimizer=dense),
            SimpleNamespace(optimizer=None),
            SimpleNamespace(optimizer=experts),
        ]
    )
    rates = megatron.ess_rates(chain, "linear", 0.5)
    assert [rate.optimizer for rate in rates] == [dense, experts]
    for rate in rates:
        rate.observe(torch.tensor([0.0, -1e4, -1e4, -1e4]))
        rate.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        rate.optimizer.step()
        assert rate.optimizer.param_groups[0]["params"][0].item() == -0.5


def test_without_a_torch_optimizer() -> None:
    with pytest.raises(
        TypeError, match=r"megatron\.ess_rates: found no torch\.optim\.Optimizer inside SimpleNamespace\."
    ):
        megatron.ess_rates(SimpleNamespace(optimizer=None))
