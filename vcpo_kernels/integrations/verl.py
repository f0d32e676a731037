"""verl: the policy losses `vcpo` and `vcpo_decoupled`, the advantage estimators `opob` and `opob_length`, and `EssAdamW`.

verl loads `verl_plugin` by itself (entry point group `verl.plugins`), which calls `register`. Written against verl 0.9;
docs/verl.md says which settings belong together. Nothing here imports verl before it is called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations import _ess_channel
from vcpo_kernels.integrations._given_advantages import weighted_advantages
from vcpo_kernels.integrations._idle import IdleWatch
from vcpo_kernels.objectives.advantages import GroupedRewards
from vcpo_kernels.sequences.behavior import warn_of_means
from vcpo_kernels.sequences.segments import Segments

WHERE = "vcpo (verl)"
CHECK = Check(WHERE)

# Where L_i comes from. "old_log_prob": it is mu itself, as verl's bypass mode makes it. "rollout_is_weights": it is the
# recomputed proximal policy, and verl's sequence-level ratio to mu comes beside it (decoupled mode).
BEHAVIOR = ("old_log_prob", "rollout_is_weights")


# A process's first losses: of several mini-batches or micro-batches of a step, only those after the first update differ.
_IDLE = IdleWatch(WHERE, patience=64)
_SAME_POLICY = (
    "the old log-probabilities have been the trainer's own so far",
    "Where they are recomputed by the trainer they are no sampler's: set rollout.calculate_log_probs=True with "
    "algorithm.rollout_correction.bypass_mode=True, or take loss_mode=vcpo_decoupled with "
    "algorithm.rollout_correction.rollout_is=sequence (docs/verl.md, Settings). Where the sampler is the trainer itself, "
    "samples are stale only after ppo_mini_batch_size or ppo_epochs made several steps of a batch.",
)


@dataclass(frozen=True)
class PolicyLossOptions:
    """behavior: one of BEHAVIOR. max_weight: truncation of w_i, None for none. Raises ValueError or TypeError.

    >>> from vcpo_kernels.integrations.verl import PolicyLossOptions
    >>> PolicyLossOptions(max_weight=None).behavior
    'old_log_prob'
    """

    behavior: str = "old_log_prob"
    max_weight: float | None = 8.0

    def __post_init__(self) -> None:
        Check("PolicyLossOptions").choice("behavior", self.behavior, BEHAVIOR)
        weight = Check("PolicyLossOptions").optional_positive_float("max_weight", self.max_weight)
        object.__setattr__(self, "max_weight", weight)


POLICY_LOSSES = {
    "vcpo": PolicyLossOptions(),
    "vcpo_decoupled": PolicyLossOptions(behavior="rollout_is_weights"),
}


def register() -> None:
    """Register the losses and estimators with verl's registries; a second call changes nothing.

    Raises ImportError where verl cannot be imported.
    """
    for name, options in POLICY_LOSSES.items():
        register_policy_loss(name, options)
    core_algos = _core_algos()
    for name, estimator in ESTIMATORS.items():
        if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(name)(estimator)


def register_policy_loss(name: str, options: PolicyLossOptions) -> None:
    """Register VCPO's policy loss under a name of your own, for `actor.policy_loss.loss_mode`.

    verl's policy_loss config takes no further keys, so settings go by name: a module of yours with
    `register_policy_loss("vcpo_untruncated", PolicyLossOptions(max_weight=None))`, named in VERL_USE_EXTERNAL_MODULES.
    """
    if not isinstance(options, PolicyLossOptions):
        raise TypeError(
            f"register_policy_loss: options must be a PolicyLossOptions, got {checks.describe(options)}. "
            "Make one: PolicyLossOptions(max_weight=8.0)."
        )

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        return policy_loss(
            old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights, options
        )

    loss.__doc__ = policy_loss.__doc__
    loss.__name__ = name
    _core_algos().register_policy_loss(name)(loss)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,
    options: PolicyLossOptions,
) -> tuple[Tensor, dict[str, Any]]:
    """VCPO's loss in verl's form: gradient -k w^_i A_t grad log pi_t, value -k w^_i A_t summed over valid tokens.

    w^_i = exp(min(L_i, log max_weight)), detached, L_i = sum_t m_t (log_prob_t - old_log_prob_t), plus the log of verl's
    sequence-level ratio where `options.behavior` is "rollout_is_weights". k is verl's own: its `agg_loss` with
    `loss_agg_mode` and the global batch's counts in `config.global_batch_info`, so that micro-batches and data-parallel ranks
    add up to the whole mini-batch. w^_i depends on its own sequence alone; ESS is taken over micro-batches and ranks by
    the optimizer's EssLearningRate (`EssAdamW`).

    Args: as verl's registered losses: four tensors [B, T], the aggregation's name, the ActorConfig, and
        `rollout_is_weights` [B, T], which `behavior="old_log_prob"` must not be given and the other must.

    Returns: (0-d loss, metrics as floats; the means over this micro-batch are averaged by verl, the step's ESS ratio and
        the factor of its rate are those of the last step).

    Raises: ValueError or TypeError naming what verl's configuration has to change.
    """
    _check_actor(config)
    segments = Segments.padded(response_mask)
    extra = _rollout_log_weights(options.behavior, rollout_is_weights, segments, response_mask)
    result = weighted_advantages(CHECK, log_prob, old_log_prob, advantages, segments, options.max_weight, extra)
    loss: Tensor = _core_algos().agg_loss(
        loss_mat=result.surrogate(log_prob),
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    how = (
        "Set actor.optim.optimizer_impl=vcpo_kernels.integrations.verl and actor.optim.optimizer=EssAdamW, "
        "or attach(optimizer) in the worker."
    )
    _ess_channel.publish(WHERE, result, loss, how)
    numbers = {name: value.item() for name, value in result.metrics.items()}
    _IDLE.see(numbers["ess_ratio"], numbers["log_weight_mean"], numbers["log_weight_max"], *_SAME_POLICY)
    if rollout_is_weights is None:  # else the difference is from the recomputed policy
        tokens = int(segments.lengths.sum())
        warn_of_means(WHERE, tokens, numbers["log_ratio_abs_mean"], numbers["log_ratio_negative_fraction"])
    metrics = {f"actor/vcpo_{name}": value for name, value in numbers.items()}
    if (last := _ess_channel.last_step()) is not None:
        for name, value in zip(("ess_ratio", "lr_scale"), last, strict=True):
            metrics[f"actor/vcpo_last_step_{name}"] = float(value)
    return loss, metrics


def _check_actor(config: Any) -> None:
    if config is None or not hasattr(config, "global_batch_info"):
        raise CHECK.type_error(
            f"config must be verl's ActorConfig with global_batch_info, got {checks.describe(config)}. "
            "The loss needs the global batch's counts to aggregate micro-batches."
        )


def _rollout_log_weights(
    behavior: str, rollout_is_weights: Tensor | None, segments: Segments, response_mask: Tensor
) -> Tensor | None:
    """log of verl's sequence-level ratio pi_old / mu, [B]; None where old_log_prob is mu itself."""
    if behavior == "old_log_prob":
        if rollout_is_weights is not None:
            raise CHECK.value_error(
                "loss_mode 'vcpo' takes old_log_probs for the sampler's, but verl also handed "
                "rollout_is_weights, so they are the recomputed ones. Set algorithm.rollout_correction.bypass_mode=True, or "
                "loss_mode=vcpo_decoupled."
            )
        return None
    if rollout_is_weights is None:
        raise CHECK.value_error(
            "loss_mode 'vcpo_decoupled' needs verl's ratio to the sampler, but rollout_is_weights is None. Set "
            "algorithm.rollout_correction.rollout_is=sequence and rollout.calculate_log_probs=True, or use loss_mode=vcpo "
            "with algorithm.rollout_correction.bypass_mode=True."
        )
    CHECK.shape("rollout_is_weights", rollout_is_weights, response_mask.shape, "response_mask.shape")
    mask = response_mask.bool()
    weights = torch.where(mask, rollout_is_weights.detach().double(), 0.0)
    mean = segments.mean(weights)
    # Read on a GPU too: verl's losses synchronise for their metrics anyway, and a mean of token ratios is no sequence ratio.
    if bool((torch.where(mask, (weights - mean[:, None]).abs(), 0.0) > 1e-4 * mean[:, None]).any()):
        raise CHECK.value_error(
            "rollout_is_weights differ between the tokens of a sequence, as rollout_is=token makes them; VCPO's "
            "weight is the sequence's. Set algorithm.rollout_correction.rollout_is=sequence."
        )
    return mean.log()


# --- advantage estimators --------------------------------------------------------------------------------------------


def opob(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    old_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    sum_pi_squared: Tensor | None = None,
    norms: str = "logit",
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """The off-policy optimal baseline's advantages: A_i = (R_i - b_g) / std_g, spread over the sequence's valid tokens.

    b_g = sum_i a_i R_i, a = softmax over the prompt's samples of 2 L_i + log n_i (VCPO, arXiv 2602.17616). R_i is the sum of
    the sequence's token-level rewards, L_i = sum_t m_t (old_log_prob_t - rollout_log_prob_t), and
    n_i = sum_t m_t (1 - 2 p_t + sum p^2) with `norms="logit"`, |T_i| with "length". std_g is the prompt's population
    standard deviation, divided by where it is > 1e-8 and `config.norm_adv_by_std_in_grpo` says so. A prompt whose rewards
    are all equal gets exactly zero, and so does a sequence whose L_i or n_i is NaN or +inf.

    verl hands an estimator under its own name nothing but rewards, mask, index and config: `hand_over_log_probs` adds
    the rest, and without it this raises.

    Args: tensors [B, T]; index: the prompts' uids [B].

    Returns: (advantages, returns), both [B, T], the same tensor.

    Raises: ValueError naming what verl has not handed over.

    >>> import numpy, torch
    >>> from vcpo_kernels.integrations.verl import opob
    >>> rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> logp = torch.full((2, 2), -0.5)
    >>> opob(rewards, torch.ones(2, 2), numpy.array(["a", "a"]), None, logp, logp, norms="length")[0]
    tensor([[ 1.,  1.],
            [-1., -1.]])
    """
    check = Check("opob (verl)")
    wanted = {"index": index, "old_log_probs": old_log_probs, "rollout_log_probs": rollout_log_probs}
    if norms == "logit":
        wanted["sum_pi_squared"] = sum_pi_squared
    _check_handed_over(check, wanted, config)
    segments = Segments.padded(response_mask)
    # Unmasked, as verl's own: rejecting a token must not reject the reward.
    rewards = token_level_rewards.double().sum(-1)
    groups = GroupedRewards(check, rewards, *_prompt_ids(index, rewards.device), segments.lengths > 0)
    log_weights = segments.sum(old_log_probs.double() - rollout_log_probs.double())  # type: ignore[union-attr]
    if norms == "logit":
        scores = 1 - 2 * old_log_probs.double().exp() + sum_pi_squared.double()  # type: ignore[union-attr]
        sqnorms = segments.sum(scores.clamp(min=0))
    else:
        sqnorms = segments.lengths.double()
    normalize = config is None or bool(config.get("norm_adv_by_std_in_grpo", True))
    advantages = groups.optimal(log_weights, sqnorms, normalize)
    spread = torch.where(response_mask.bool(), advantages[:, None], 0.0).to(token_level_rewards.dtype)
    return spread, spread


def _check_handed_over(check: Check, wanted: dict[str, Any], config: Any) -> None:
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise check.value_error(
            f"verl handed over no {', '.join(missing)}. Call "
            "vcpo_kernels.integrations.verl.hand_over_log_probs() in a module named in VERL_USE_EXTERNAL_MODULES, with "
            "rollout.calculate_log_probs=True; sum_pi_squared also needs actor.calculate_sum_pi_squared=True and a trainer "
            "that keeps it (adv_estimator=opob_length does without)."
        )
    correction = config.get("rollout_correction", None) if config is not None else None
    if correction is not None and correction.get("bypass_mode", False):
        raise check.value_error(
            "with algorithm.rollout_correction.bypass_mode=True old_log_probs are the sampler's, so every L_i is 0 "
            "when advantages are computed. Use decoupled mode (bypass_mode=False) with loss_mode=vcpo_decoupled."
        )


def _prompt_ids(index: Any, device: torch.device) -> tuple[Tensor, int]:
    """uids of any hashable kind -> int64 ids [B] numbered from 0, and how many prompts there are."""
    numbers: dict[Any, int] = {}
    ids = [numbers.setdefault(uid, len(numbers)) for uid in (index.tolist() if hasattr(index, "tolist") else index)]
    return torch.tensor(ids, dtype=torch.int64, device=device), len(numbers)


def opob_length(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """`opob` with n_i = |T_i|: no sum of squared probabilities needed, at the price of a cruder norm."""
    return opob(token_level_rewards, response_mask, index, config, **{**rest, "norms": "length"})


ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"opob": opob, "opob_length": opob_length}

HANDED_OVER = ("old_log_probs", "rollout_log_probs", "sum_pi_squared")
COMPUTE_ADVANTAGE = ("verl.trainer.ppo.ray_trainer", "verl.trainer.ppo.v1.utils")  # where verl's trainers look it up


def hand_over_log_probs() -> list[str]:
    """Have verl's `compute_advantage` give this module's estimators the log-probabilities that its batch holds.

    verl passes them to its own optimal token baseline alone, so this wraps the function in the modules of verl's trainers;
    every other estimator takes its usual way. For the driver process: call it from a module that VERL_USE_EXTERNAL_MODULES
    names.

    Returns: the modules it is wrapped in. Raises ImportError where none of them can be imported.
    """
    done, problems = [], []
    for name in COMPUTE_ADVANTAGE:
        try:
            module = importlib.import_module(name)
        except ImportError as problem:
            problems.append(f"{name}: {problem}")
            continue
        module.compute_advantage = handing_over(module.compute_advantage)  # type: ignore[attr-defined]
        done.append(name)
    if not done:
        raise ImportError(f"hand_over_log_probs: none of verl's trainers can be imported. {'; '.join(problems)}")
    return done


def handing_over(compute_advantage: Callable[..., Any]) -> Callable[..., Any]:
    """`compute_advantage` with this module's estimators taken out and given more; wrapping twice changes nothing."""
    if getattr(compute_advantage, "hands_over_log_probs", False):
        return compute_advantage

    @functools.wraps(compute_advantage)
    def wrapper(data: Any, adv_estimator: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        estimator = ESTIMATORS.get(getattr(adv_estimator, "value", adv_estimator))
        if estimator is None:
            return compute_advantage(data, adv_estimator, *args, config=config, **kwargs)
        batch = data.batch
        advantages, returns = estimator(
            token_level_rewards=batch["token_level_rewards"],
            response_mask=batch["response_mask"],
            index=data.non_tensor_batch.get("uid"),
            config=config,
            **{name: batch[name] if name in batch.keys() else None for name in HANDED_OVER},  # noqa: SIM118
        )
        batch["advantages"], batch["returns"] = advantages, returns
        return data

    wrapper.hands_over_log_probs = True  # type: ignore[attr-defined]
    return wrapper


# --- the step ---------------------------------------------------------------------------------------------------------

attach = _ess_channel.attach


class EssAdamW(torch.optim.AdamW):
    """AdamW whose steps are scaled by the ESS of the policy losses of this process, over all ranks of the actor.

    For verl's FSDP engines, which build the optimizer that the configuration names: actor.optim.optimizer_impl =
    vcpo_kernels.integrations.verl, actor.optim.optimizer = EssAdamW. `actor.optim.override_optimizer_config` may set ess_rule
    ("sqrt" | "linear") and ess_reference beside AdamW's own. For the actor alone: a critic's steps are not VCPO's.

    >>> import torch
    >>> from vcpo_kernels.integrations.verl import EssAdamW
    >>> optimizer = EssAdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1, ess_reference=0.5)
    >>> optimizer.ess_rate.reference
    0.5
    >>> optimizer.detach()
    """

    def __init__(
        self, params: Any, *args: Any, ess_rule: str = "sqrt", ess_reference: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, **kwargs)
        self.ess_rate = _ess_channel.attach(self, ess_rule, ess_reference)

    def detach(self) -> None:
        """Go on as plain AdamW."""
        _ess_channel.detach(self.ess_rate)


def _core_algos() -> Any:
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as problem:
        raise ImportError(f"vcpo_kernels.integrations.verl needs verl (pip install verl): {problem}") from problem
