"""VCPOTrainer under FSDP2 on two ranks ends with the parameters of one process, as it does under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.distributed.sharded_models import whole_of
from tests.integrations import trl_setup as setup
from tests.integrations.test_trl_ranks import LOGGED, OfRank

TWO_ROUNDS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
CASES: dict[str, dict[str, Any]] = {  # of two processes; one takes twice the sequences at a time
    "logit": TWO_ROUNDS,
    "exact": TWO_ROUNDS | {"score_norm": "exact"},
    "exact, KL, entropy": TWO_ROUNDS
    | {"score_norm": "exact", "beta": 0.2, "entropy_coef": 0.1, "activation_checkpointing": True},
    "a group over two ranks": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2},
}


@contextmanager
def fsdp2_on_cpu() -> Iterator[None]:
    """Accelerate's own FSDP2, which its launcher alone keeps from CPUs."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    made = accelerate.Accelerator.__init__

    def make(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], reshard_after_forward=True, cpu_ram_efficient_loading=False,
        )  # fmt: skip
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "__init__", make)
        yield


def train(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    trainer = setup.VCPOTrainer(
        str(folder / "model"), setup.reward, setup.arguments(folder / "out", **changes), setup.dataset(),
        processing_class=setup.tokenizer(), rollout_func=OfRank(),
    )  # fmt: skip
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = dict(model.named_parameters())
    return {
        "sharded": all(hasattr(p, "full_tensor") for p in parameters.values()),
        "parameters": {n: whole_of(p.detach()).clone() for n, p in parameters.items()},
        "logged": [{k: e[k] for k in LOGGED if k in e} for e in trainer.state.log_history if "loss" in e],
    }


def on_rank(rank: int, folder: Path) -> dict[str, Any]:
    with fsdp2_on_cpu():
        return {name: train(folder, changes) for name, changes in CASES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharded")
    setup.model().save_pretrained(made / "model")
    return made


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    return ranks.run(on_rank, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_as_one_process(of_two: list[dict[str, Any]], folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    changes = CASES[name]
    want = train(tmp_path, {**changes, "per_device_train_batch_size": 2 * changes["per_device_train_batch_size"]})
    start = setup.transformers.LlamaForCausalLM.from_pretrained(folder / "model").state_dict()
    assert want["logged"][-1]["vcpo/ess_ratio"] < 0.99
    for result in (of_rank[name] for of_rank in of_two):
        assert result["sharded"]
        for logged, expected in zip(result["logged"], want["logged"], strict=True):
            assert logged == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for parameter, expected in want["parameters"].items():
            torch.testing.assert_close(result["parameters"][parameter], expected, rtol=0, atol=1e-5)
            assert not torch.equal(expected, start[parameter])
