"""VCPO in TRL: `VCPOTrainer` in the place of GRPOTrainer, `VCPOTrainingConfig` in the place of GRPOConfig.

    from vcpo_kernels.integrations.trl import VCPOTrainer, VCPOTrainingConfig

    trainer = VCPOTrainer(model, reward_funcs=reward, args=VCPOTrainingConfig(output_dir="out"), train_dataset=dataset)
    trainer.train()

`VCPOAsyncTrainer` and `VCPOAsyncTrainingConfig` do the same for AsyncGRPOTrainer and AsyncGRPOConfig. docs/trl.md says what
is honoured, what is refused and what is logged. Needs `pip install 'trl>=1.16,<1.17'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vcpo_kernels.integrations.trl._versions import check_trl

check_trl()

from vcpo_kernels.integrations.trl.config import VCPOTrainingConfig  # noqa: E402
from vcpo_kernels.integrations.trl.trainer import VCPOTrainer  # noqa: E402

if TYPE_CHECKING:
    from vcpo_kernels.integrations.trl.async_trainer import VCPOAsyncTrainer, VCPOAsyncTrainingConfig

__all__ = ["VCPOAsyncTrainer", "VCPOAsyncTrainingConfig", "VCPOTrainer", "VCPOTrainingConfig"]


def __getattr__(name: str) -> Any:
    # TRL's asynchronous trainer has requirements of its own, which a user of the other need not have.
    if name in ("VCPOAsyncTrainer", "VCPOAsyncTrainingConfig"):
        from vcpo_kernels.integrations.trl import async_trainer

        return getattr(async_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
