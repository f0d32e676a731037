"""Every option of TRL's configurations, as data: honoured, or refused with the reason. Nothing is dropped silently.

An option in no table (a newer TRL's) may keep its default and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vcpo_kernels.integrations._sampling import OFF, REASON, changed
from vcpo_kernels.integrations.trl._versions import TESTED_BELOW, TESTED_FROM


@dataclass(frozen=True)
class Options:
    """How each option of a configuration class is treated, by name; values are reasons.

    honoured: does what it does in TRL. refused: takes no value but TRL's default. limited: takes the listed values.
    unset: options of transformers' TrainingArguments that must stay unset. whole_sequences: whether parallelism that has
    several ranks work on the same sequences is refused.
    """

    honoured: frozenset[str]
    refused: Mapping[str, str]
    limited: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    unset: Mapping[str, str] = field(default_factory=dict)
    whole_sequences: bool = False


# loss_type -> VCPOConfig.aggregation: how a loss type of TRL's weighs tokens, without its clipping.
AGGREGATION_OF = {
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
}

_CLIPPING = "VCPO clips no ratio: it truncates sequence weights at max_weight and shortens the step by the ESS."
_WEIGHTS = "VCPO has sequence weights of its own, truncated at max_weight."
_VLLM_WEIGHTS = "VCPO corrects for the sampler and for staleness in one weight, truncated at max_weight."
_SAPO, _VESPO = "It belongs to loss_type='sapo'.", "It belongs to loss_type='vespo'."
_ENTROPY_CONTROL = "Adaptive entropy control is not built in; a constant entropy_coef is."
_COMPILED = "The head is patched in each forward, which a compiled model does not see."
_LOSS_TYPES = "Say how tokens are weighed with loss_type='dapo', 'grpo' or 'dr_grpo', or with aggregation=..."

_SAMPLING = {name: (OFF[name], REASON) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}

_DEEPSPEED = "TRL's asynchronous trainer has not been tried with it. Use DistributedDataParallel."

GRPO = Options(
    honoured=frozenset({
        "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "cast_lm_head_to_fp32",
        "num_generations", "num_generations_eval", "max_completion_length", "ds3_gather_for_generation",
        "shuffle_dataset", "pad_to_multiple_of", "generation_batch_size", "steps_per_generation", "temperature",
        "generation_kwargs", "chat_template_kwargs",
        "cache_implementation", "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
        "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
        "vllm_tensor_parallel_size", "vllm_importance_sampling_correction", "beta", "use_bias_correction_kl",
        "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "num_iterations", "reward_weights",
        "mask_truncated_completions", "entropy_coef", "max_tool_calling_iterations", "log_completions",
        "log_multimodal", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo",
        "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    }),
    refused={
        "epsilon": _CLIPPING,
        "epsilon_high": _CLIPPING,
        "delta": _CLIPPING,
        "sapo_temperature_neg": _SAPO,
        "sapo_temperature_pos": _SAPO,
        "vespo_k_pos": _VESPO,
        "vespo_lambda_pos": _VESPO,
        "vespo_k_neg": _VESPO,
        "vespo_lambda_neg": _VESPO,
        "importance_sampling_level": _WEIGHTS,
        "multi_objective_aggregation": "VCPO's baseline is a mean of the rewards themselves, not of normalised ones.",
        "top_entropy_quantile": "VCPO's weights, norms and baselines are of whole sequences.",
        "use_adaptive_entropy": _ENTROPY_CONTROL,
        "entropy_coef_min": _ENTROPY_CONTROL,
        "entropy_coef_max": _ENTROPY_CONTROL,
        "entropy_coef_delta": _ENTROPY_CONTROL,
        "entropy_target": _ENTROPY_CONTROL,
        "vllm_importance_sampling_mode": _VLLM_WEIGHTS,
        "vllm_importance_sampling_clip_max": _VLLM_WEIGHTS,
        "vllm_importance_sampling_clip_min": _VLLM_WEIGHTS,
        "vllm_importance_sampling_cap": _VLLM_WEIGHTS,
        "off_policy_mask_threshold": "VCPO keeps stale sequences, by their weights.",
    },
    limited=_SAMPLING | {
        "vllm_structured_outputs_regex": ((None,), REASON),
        "loss_type": (tuple(AGGREGATION_OF), f"The others are other losses than VCPO's. {_LOSS_TYPES}"),
        "scale_rewards": (
            ("group", "none", True, False),
            "VCPO divides by the standard deviation of the group, or by nothing.",
        ),
    },
    unset={
        "torch_compile": _COMPILED,
        "torch_compile_backend": _COMPILED,
        "torch_compile_mode": _COMPILED,
        "neftune_noise_alpha": "The two passes of a window would see different noise.",
        "label_smoothing_factor": "There are no labels to smooth.",
    },
    whole_sequences=True,
)  # fmt: skip

ASYNC_GRPO = Options(
    honoured=frozenset({
        "model_init_kwargs", "dtype", "trust_remote_code", "router_aux_loss_coef", "num_generations",
        "max_completion_length", "temperature", "chat_template_kwargs",
        "max_tool_calling_iterations", "fork_threshold_tokens", "vllm_server_base_url", "vllm_server_timeout",
        "request_timeout", "weight_sync_timeout", "token_budget", "max_inflight_tasks", "max_staleness",
        "queue_maxsize", "weight_sync_steps", "heartbeat_stale_after_s", "log_completions", "num_completions_to_print",
    }),
    refused={"epsilon": _CLIPPING, "epsilon_high": _CLIPPING},
    limited=_SAMPLING,
    unset={"deepspeed": _DEEPSPEED, "label_smoothing_factor": "There are no labels to smooth."},
)  # fmt: skip

_STEPLESS_OPTIMIZERS = ("lomo", "adalomo")


def refuse_options(where: str, args: Any, of_trl: type, inherited: type, options: Options) -> None:
    """Raise ValueError for the options of `args` that are not honoured, each by name with what it got and the reason.

    args: a config object. of_trl: TRL's config class, whose defaults are allowed. inherited: the class above it, whose
    options are looked at only where `options.unset` names them.
    """
    above = {f.name for f in dataclasses.fields(inherited)}
    problems = []
    for f in dataclasses.fields(of_trl):
        value = getattr(args, f.name)
        if f.name in above or f.name in options.honoured or value == _default(f):
            continue
        if f.name in options.limited:
            allowed, reason = options.limited[f.name]
            if value not in allowed:
                problems.append(f"{f.name}={value!r}: {reason}")
        elif f.name in options.refused:
            problems.append(f"{f.name}={value!r}: {options.refused[f.name]} Leave it at {_default(f)!r}.")
        else:
            tested = f"TRL {TESTED_FROM[0]}.{TESTED_FROM[1]} to below {TESTED_BELOW[0]}.{TESTED_BELOW[1]}"
            problems.append(f"{f.name}={value!r}: not known to this version, which knows {tested}.")
    generation = changed(getattr(args, "generation_kwargs", None) or {})
    problems += [f"generation_kwargs[{name!r}]={value!r}: {REASON}" for name, value in generation.items()]
    problems += [f"{n}={getattr(args, n)!r}: {why}" for n, why in options.unset.items() if getattr(args, n, None)]
    if str(getattr(args.optim, "value", args.optim)) in _STEPLESS_OPTIMIZERS:
        problems.append(f"optim={args.optim!r}: it updates inside backward, before the step's rate is known.")
    parallelism = getattr(args, "parallelism_config", None)
    shared = [n for n in ("tp", "cp", "sp") if options.whole_sequences and getattr(parallelism, f"{n}_enabled", False)]
    problems += [
        f"parallelism_config.{n}_size: several ranks would work on the same sequences, and a window counts every rank's. "
        "A loop to copy is in docs/parallel.md."
        for n in shared
    ]
    if problems:
        raise ValueError(f"{where} does not honour these options:\n  " + "\n  ".join(problems))


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
