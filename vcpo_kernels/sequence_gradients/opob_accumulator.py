"""OPOBAccumulator: the optimal baseline as its paper computes it, one trajectory after the other, for any model.

Layer: sequences [B]. b_g is known only once every norm of the group is; the update is linear in b_g, though:
sum_i u_i (R_i - b) grad_i = sum_i u_i R_i grad_i - b sum_i u_i grad_i. The first sum goes straight into param.grad, the
second into one buffer, of which b times is taken off when the group is complete (VCPO, arXiv 2602.17616, which holds
both sums in buffers of their own).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel.ranks import size_of
from vcpo_kernels.parallel.slices import is_slice
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.aggregation import aggregation_scale
from vcpo_kernels.sequences.log_weights import sequence_log_weights, usable_below
from vcpo_kernels.sequences.segments import Segments, check_segments
from vcpo_kernels.sequences.vcpo import VCPOConfig, VCPOOutput, vcpo_loss

WHERE = "OPOBAccumulator"
CHECK = Check(WHERE)


@dataclass
class _Group:
    """A prompt's sequences so far, and the group's place among all."""

    rewards: Tensor  # [n], as given
    std: float  # what advantages are divided by
    center: float  # the mean reward, taken off so that the two sums stay small beside their difference
    equal: bool
    norms: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Sequence:
    """What remains of a sequence for the output: valid tokens' logp and behaviour logp, and its squared norm."""

    logp: Tensor
    behavior_logp: Tensor
    norm: Tensor


class OPOBAccumulator:
    """Adds VCPO's gradient with exact optimal baselines to `param.grad`, from one backward per trajectory.

    Needs one buffer of the parameters' size beside param.grad, and as many backwards as there are sequences;
    `SequenceGradients` needs neither, but knows its modules. Under DistributedDataParallel call it inside `no_sync()`, and
    `vcpo_kernels.parallel.average_gradients` afterwards. Groups one after the other, a group's sequences one by one:

    >>> import torch, vcpo_kernels as vk
    >>> model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
    >>> ids, mask, rewards = torch.randint(0, 7, (4, 5)), torch.ones(4, 5), torch.tensor([1.0, 0.0, 0.0, 1.0])
    >>> opob = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=4))
    >>> for group in (slice(0, 2), slice(2, 4)):
    ...     opob.start_group(rewards[group])
    ...     for i in range(group.start, group.stop):
    ...         stats = vk.token_stats(model(ids[i : i + 1]), ids[i : i + 1], shift=True)
    ...         opob.backward(stats, stats.logp.detach(), vk.Segments.padded(mask[i : i + 1]))
    ...     baseline = opob.finish_group()
    >>> out = opob.output()  # ESS, advantages, metrics of all four; out.loss carries no gradient
    >>> out.baselines.shape
    torch.Size([2])

    Args:
        params: the parameters whose gradients count, in the norm and in the update.
        config: as `vcpo_loss` takes it. k_i must not depend on what is still to come: `num_sequences` is needed
            ("token-mean": `num_tokens`), "seq-mean-token-sum-norm" needs `max_tokens`. `score_norm` is measured here.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, params: Iterable[Tensor], config: VCPOConfig) -> None:
        if isinstance(params, Tensor) or not isinstance(params, Iterable):
            raise CHECK.type_error(
                f"params must be an iterable of parameters, got {checks.describe(params)}. model.parameters()."
            )
        given = list(params)
        for p in given:
            CHECK.tensor("params", p, fix="Pass model.parameters(), not named_parameters().")
            if checks.is_dtensor(p):
                raise CHECK.type_error("params holds a DTensor, of whose gradient this rank has a part only.")
            if is_slice(p):
                raise CHECK.type_error(
                    "params holds slices of Megatron's tensor parallelism, of whose gradients this rank has a part only. Take "
                    'vcpo_loss with VCPOConfig(score_norm="logit").'
                )
        self._params = [p for p in given if p.requires_grad]
        if not self._params:
            raise CHECK.value_error(f"params must hold parameters that require a gradient, got {len(given)} without.")
        self._config = _checked_config(config)
        self._buffer: dict[Tensor, Tensor] = {}
        self._group: _Group | None = None
        self._rewards: list[Tensor] = []
        self._sequences: list[_Sequence] = []

    def start_group(self, rewards: Tensor) -> None:
        """Begin a prompt. rewards: R_i of its sequences, [n], in the order in which `backward` will see them."""
        check = Check(f"{WHERE}.start_group")
        if self._group is not None:
            raise check.runtime_error("the group before is not finished. Call finish_group() first.")
        check.tensor("rewards", rewards)
        if rewards.dim() != 1 or rewards.numel() == 0:
            raise check.value_error(f"rewards must be [n] with n >= 1, got {checks.describe(rewards)}.")
        r = rewards.detach().double()
        if not bool(r.isfinite().all()):
            raise check.value_error(
                f"rewards must be finite, got {rewards.tolist()[:8]}. Give failed samples a number."
            )
        std = float(r.std(correction=0))
        divisor = std if self._config.normalize_std and std > 1e-8 else 1.0
        self._group = _Group(rewards.detach(), divisor, float(r.mean()), bool((r == r[0]).all()))

    def backward(self, stats: TokenStats, behavior_logp: Tensor, segments: Segments) -> None:
        """Take one sequence's gradient: its norm, and its part of the update.

        A sequence whose L_i is NaN or +inf is left out of both, as in `vcpo_loss`; so are all of a group whose rewards are
        equal, without a backward.

        Args:
            stats: of a batch of one sequence. behavior_logp: in the shape of stats.logp. segments: with one sequence.
        """
        check = Check(f"{WHERE}.backward")
        group = self._started(check)
        check_segments(check, segments)
        if segments.num_sequences != 1:
            raise check.value_error(
                f"segments must hold one sequence, got {segments.num_sequences}. Call once for each."
            )
        if len(group.norms) == len(group.rewards):
            raise check.value_error(f"all {len(group.rewards)} sequences of the group are in. Call finish_group().")
        if size_of(segments.sequence_group) > 1:
            raise check.value_error(
                "segments have a sequence_group: this rank's gradient is of its own tokens, and norms of such parts do not add "
                "up. Use SequenceGradients, which puts them together first."
            )
        log_weight = sequence_log_weights(stats, behavior_logp, segments)
        length = self._keep(stats, behavior_logp, segments)
        norm = torch.zeros((), dtype=torch.float64, device=log_weight.device)
        value = float(log_weight.detach())
        takes_part = value < usable_below(self._config.max_weight)  # NaN is not
        if takes_part and length and not group.equal:
            if not stats.logp.requires_grad:
                raise check.value_error("stats carry no gradient: take them under grad mode, from the model itself.")
            scale = -self._scale(value, length) / group.std
            reward = float(group.rewards[len(group.norms)]) - group.center
            norm = self._backward(log_weight.sum(), scale, reward)
        group.norms.append(norm)

    def finish_group(self) -> Tensor:
        """Complete the prompt's part of param.grad. Returns its baseline b_g, 0-d."""
        check = Check(f"{WHERE}.finish_group")
        group = self._started(check)
        count = len(group.rewards)
        if len(group.norms) != count:
            raise check.runtime_error(
                f"{len(group.norms)} of the group's {count} sequences are in. backward() the rest."
            )
        first = len(self._sequences) - count
        self._sequences[first:] = [
            dataclasses.replace(s, norm=n) for s, n in zip(self._sequences[first:], group.norms, strict=True)
        ]
        baseline = self._output_of([group.rewards], self._sequences[first:]).baselines[0]
        with torch.no_grad():
            for p in self._params:
                buffer = self._buffer.get(p)
                if buffer is not None and p.grad is not None and math.isfinite(float(baseline)):
                    p.grad.sub_(buffer * (float(baseline) - group.center))
                    buffer.zero_()
        self._rewards.append(group.rewards)
        self._group = None
        return baseline

    def output(self) -> VCPOOutput:
        """ESS, baselines, advantages, coefficients and metrics of all finished groups, for `EssLearningRate.observe` and
        logs; its loss carries no gradient. Begins anew.
        """
        check = Check(f"{WHERE}.output")
        if self._group is not None:
            raise check.runtime_error("a group is not finished. Call finish_group() first.")
        if not self._rewards:
            raise check.runtime_error("no group was finished.")
        result = self._output_of(self._rewards, self._sequences)
        self._rewards, self._sequences = [], []
        return result

    # --- inside ------------------------------------------------------------------------------------------------------

    def _backward(self, log_weight: Tensor, scale: float, reward: float) -> Tensor:
        """param.grad += scale reward grad, buffer += scale grad; ||grad||^2. Each parameter's gradient as it arrives."""
        norms: list[Tensor] = []

        def hook_of(p: Tensor) -> Any:
            def hook(grad: Tensor | None) -> Tensor | None:
                if grad is None:
                    return None
                norms.append(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
                buffer = self._buffer.get(p)
                if buffer is None:
                    buffer = self._buffer[p] = torch.zeros_like(p)
                buffer.add_(grad, alpha=scale)
                return grad * (scale * reward)

            return hook

        hooks = [p.register_hook(hook_of(p)) for p in self._params]
        try:
            log_weight.backward(inputs=self._params)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([n.to(log_weight.device) for n in norms]).sum()

    def _scale(self, log_weight: float, length: float) -> float:
        """k_i w^_i"""
        c = self._config
        of_length, sequences, tokens = (
            torch.tensor([float(n or 1)], dtype=torch.float64, device="cpu")
            for n in (length, c.num_sequences, c.num_tokens)
        )
        k = aggregation_scale(c.aggregation, of_length, sequences, tokens, c.max_tokens)
        clip = math.inf if c.max_weight is None else math.log(c.max_weight)
        return float(k) * math.exp(min(log_weight, clip))

    def _keep(self, stats: TokenStats, behavior_logp: Tensor, segments: Segments) -> float:
        """Remember the valid tokens; how many they are."""
        logp = segments.flat(CHECK, "stats", stats.logp).detach()
        valid = segments.seen_by(stats).valid(logp.numel())
        mu = segments.flat(CHECK, "behavior_logp", behavior_logp).detach()
        self._sequences.append(_Sequence(logp[valid], mu[valid], logp.new_zeros(())))
        return float(valid.sum())

    def _output_of(self, rewards: list[Tensor], sequences: list[_Sequence]) -> VCPOOutput:
        logp = torch.cat([s.logp for s in sequences])
        lengths = torch.tensor([0, *(len(s.logp) for s in sequences)], device=logp.device)
        groups = torch.repeat_interleave(torch.tensor([len(r) for r in rewards], device=logp.device))
        norms = torch.stack([s.norm.to(torch.float64) for s in sequences])
        config = dataclasses.replace(self._config, score_norm=norms)
        nothing = torch.zeros_like(logp)
        stats = TokenStats(logp, entropy=nothing, score_sqnorm=nothing, lse=nothing)
        return vcpo_loss(
            stats,
            torch.cat([s.behavior_logp for s in sequences]),
            torch.cat(rewards),
            groups,
            Segments.packed(lengths.cumsum(0)),
            config,
            num_groups=len(rewards),
        )

    def _started(self, check: Check) -> _Group:
        if self._group is None:
            raise check.runtime_error("no group is started. Call start_group(rewards) first.")
        return self._group


def _checked_config(config: Any) -> VCPOConfig:
    if not isinstance(config, VCPOConfig):
        raise CHECK.type_error(f"config must be a VCPOConfig, got {checks.describe(config)}.")
    if isinstance(config.score_norm, Tensor):
        raise CHECK.value_error("config.score_norm must stay 'logit': the exact norms are measured here.")
    needed = {"token-mean": "num_tokens"}.get(config.aggregation, "num_sequences")
    needs = [needed] + ["max_tokens"] * (config.aggregation == "seq-mean-token-sum-norm")
    for name in needs:
        if getattr(config, name) is None:
            raise CHECK.value_error(
                f"aggregation {config.aggregation!r} needs config.{name}, since sequences are scaled one by one, "
                f"before all are seen. Set VCPOConfig({name}=...) to that of the whole step."
            )
    return config
