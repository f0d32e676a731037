"""No option of GRPOConfig is dropped silently: each is honoured, or refused by name with a reason; VCPO's own are checked."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig
from trl.trainer.base_config import _BaseConfig

from tests.integrations import trl_setup as setup
from vcpo_kernels.integrations.trl import VCPOTrainer, VCPOTrainingConfig, _versions, options

GRPO_FIELDS = {f.name: f for f in dataclasses.fields(GRPOConfig)}
OF_GRPO = set(GRPO_FIELDS) - {f.name for f in dataclasses.fields(_BaseConfig)}

# A value other than the default for each option that takes none.
OTHER: dict[str, Any] = {
    "epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5, "sapo_temperature_neg": 1.0, "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0,
    "importance_sampling_level": "sequence", "multi_objective_aggregation": "normalize_then_sum",
    "top_entropy_quantile": 0.2, "use_adaptive_entropy": True, "entropy_coef_min": 0.1, "entropy_coef_max": 0.5,
    "entropy_coef_delta": 0.1, "entropy_target": 1.0, "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 2.0, "vllm_importance_sampling_clip_min": 0.1,
    "vllm_importance_sampling_cap": 2.0, "off_policy_mask_threshold": 0.5,
}  # fmt: skip
LIMITED = {
    "loss_type": ["bnpo", "cispo", "sapo", "luspo", "vespo"], "scale_rewards": ["batch"],
    "top_p": [0.95], "top_k": [50], "min_p": [0.1], "repetition_penalty": [1.1], "vllm_structured_outputs_regex": ["yes"],
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default",
    "neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1,
    "optim": "lomo",
}  # fmt: skip


def test_every_option_of_this_trl_is_in_exactly_one_table() -> None:
    tables = [options.GRPO.honoured, set(options.GRPO.refused), set(options.GRPO.limited)]
    assert set.union(*map(set, tables)) == OF_GRPO
    assert sum(map(len, tables)) == len(OF_GRPO)
    assert set(OTHER) == set(options.GRPO.refused)
    assert set(LIMITED) == set(options.GRPO.limited)
    assert set(options.GRPO.unset) | {"optim"} == set(TRAINING)


@pytest.mark.parametrize(
    ("name", "value"),
    [*OTHER.items(), *((n, v) for n, values in LIMITED.items() for v in values), *TRAINING.items()],
)
def test_an_option_that_is_not_honoured_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"does not honour(.|\n)*{name}='?{value}'?: \S"):
        setup.arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "setting", [{"top_p": 0.9}, {"typical_p": 0.9}, {"bad_words_ids": [[1]]}, {"logit_bias": {1: 2.0}}]
)
def test_a_kept_set_hidden_in_generation_kwargs_is_found(tmp_path: Path, setting: dict[str, Any]) -> None:
    """The sampler's probabilities would be over what it kept: every weight vanishes while ESS reads 1."""
    (name,) = setting
    with pytest.raises(ValueError, match=rf"generation_kwargs\['{name}'\]=.*part of the vocabulary"):
        setup.arguments(tmp_path, generation_kwargs={**setting, "max_new_tokens": 3})


def test_sampling_from_the_whole_vocabulary_is_taken_however_it_is_written(tmp_path: Path) -> None:
    setup.arguments(tmp_path, top_p=1, top_k=-1, min_p=0.0, generation_kwargs={"top_k": 0, "repetition_penalty": 1.0})


@pytest.mark.parametrize("dimension", ["tp", "cp", "sp"])
def test_ranks_that_work_on_the_same_sequences_are_refused(tmp_path: Path, dimension: str) -> None:
    config = types.SimpleNamespace(**{f"{dimension}_enabled": True})
    args = setup.arguments(tmp_path)
    args.parallelism_config = config
    with pytest.raises(ValueError, match=rf"parallelism_config\.{dimension}_size: several ranks.*docs/parallel\.md"):
        options.refuse_options("VCPOTrainer", args, GRPOConfig, _BaseConfig, options.GRPO)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"epsilon=0.1(.|\n)*top_entropy_quantile=0.2"):
        setup.arguments(tmp_path, epsilon=0.1, top_entropy_quantile=0.2)


def test_an_option_of_a_newer_trl_is_refused_until_it_is_known(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Newer(GRPOConfig):
        new_trick: float = 0.0

    args = setup.arguments(tmp_path, GRPOConfig)
    args.new_trick = 0.0
    options.refuse_options("here", args, Newer, _BaseConfig, options.GRPO)
    args.new_trick = 1.0
    with pytest.raises(
        ValueError, match=r"new_trick=1.0: not known to this version, which knows TRL 1\.16 to below 1\.17"
    ):
        options.refuse_options("here", args, Newer, _BaseConfig, options.GRPO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_weight": -1.0}, "max_weight must be finite and > 0"),
        ({"max_weight": "8"}, "max_weight must be a float > 0 or None"),
        ({"baseline_weighting": "best"}, "baseline_weighting must be one of 'paper', 'estimator'"),
        ({"aggregation": "mean"}, "aggregation must be one of 'seq-mean-token-mean'"),
        ({"aggregation": "token-mean", "loss_type": "grpo"}, "aggregation='token-mean' and loss_type='grpo'.*disagree"),
        ({"score_norm": "head"}, "score_norm must be one of 'logit', 'exact'"),
        ({"ess_rule": "cube"}, "ess_rule must be one of 'sqrt', 'linear', 'none'"),
        ({"ess_reference": 0.0}, "ess_reference must be finite and > 0"),
        ({"ess_max_weight": float("inf")}, "ess_max_weight must be finite and > 0"),
        (
            {"score_norm": "exact", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "score_norm='exact' cannot see into reentrant checkpoints",
        ),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2},
            "give an optimizer step 2 sequences of a generation.*whole groups of num_generations=4",
        ),
    ],
)
def test_vcpos_own_options_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        setup.arguments(tmp_path, **changes)


def test_a_grpo_config_is_refused_with_the_name_to_change(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"args must be a VCPOTrainingConfig, got 'GRPOConfig'.*change the name"):
        VCPOTrainer(setup.model(), setup.reward, setup.arguments(tmp_path, GRPOConfig), setup.dataset())


def test_exact_norms_of_a_model_that_has_none_are_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    class Odd(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.0

    base = setup.model()
    base.model.layers[0].mlp.up_proj.__class__ = Odd
    with pytest.raises(ValueError, match=r"score_norm='exact' does not work with this model(.|\n)*up_proj"):
        setup.trainer(tmp_path, base=base, score_norm="exact")


def test_too_few_prompts_for_one_step_are_refused(tmp_path: Path) -> None:
    """TRL trains no step, and warns."""
    trainer = setup.trainer(tmp_path, per_device_train_batch_size=20)
    with pytest.raises(ValueError, match=r"train_dataset has 8 prompts, and one generation takes 10.*Add prompts"):
        trainer.train()


def test_active_dropout_is_warned_of(tmp_path: Path) -> None:
    base = setup.model()
    base.model.layers[0].add_module("dropout", torch.nn.Dropout(0.1))
    with pytest.warns(UserWarning, match=r"dropout is active.*disable_dropout=True"):
        setup.trainer(tmp_path, base=base, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with warnings.catch_warnings(record=True) as seen:
        setup.trainer(tmp_path, base=base)  # in one pass there is no other dropout
    assert not any("dropout" in str(warning.message) for warning in seen)


@pytest.mark.parametrize("installed", ["1.15.2", "1.17.0", "2.0.0.dev0", "0.29"])
def test_another_trl_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    with pytest.raises(ImportError, match=rf"trl {installed} is installed.*pip install 'trl>=1.16,<1.17'"):
        _versions.check_trl()


def test_no_trl_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"needs TRL, which is not installed. Install a tested one: pip install"):
        _versions.check_trl()


def test_the_configuration_survives_a_round_trip_through_a_parser() -> None:
    from transformers import HfArgumentParser

    words = ["--output_dir", "out", "--use_cpu", "--bf16", "false", "--max_weight", "4", "--score_norm", "exact"]
    (args,) = HfArgumentParser(VCPOTrainingConfig).parse_args_into_dataclasses(words)
    assert (args.max_weight, args.score_norm) == (4.0, "exact")
