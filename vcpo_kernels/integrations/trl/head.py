"""The head that TRL's trainers call, computed by this package's kernels.

TRL patches `model.forward` so that `model(..., labels=labels, fused_lm_head=True)` returns log-probabilities instead of
logits. `attach_head` puts one more forward around that, which answers the same call with score norms as well, and, given
coefficients, with the weighted sum of log-probabilities whose gradient is taken in the same pass. All of it happens inside
the model's forward, where DistributedDataParallel and autocast expect a model's work to be done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import vcpo_kernels as vk


@dataclasses.dataclass
class VCPOHeadOutput(ModelOutput):
    """Answer to `fused_lm_head=True`. Per-token fields [B, T], entry t about token t, 0 where the label is -100.

    loss: sum_t c_t logp_t + h_t entropy_t for coefficients c and entropy_coefficients h, else None.
    log_probs, entropy: with gradient where no coefficients were given. score_sqnorm: without.
    aux_loss: the model's router loss, where it was asked for.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    score_sqnorm: Tensor | None = None
    aux_loss: Tensor | None = None


def attach_head(model: nn.Module, temperature: float, fp32: bool = False) -> None:
    """Answer `model(.., labels=labels, fused_lm_head=True, coefficients=c, entropy_coefficients=h)`; leave other calls be.

    model: a causal LM that `patch_head` takes, not wrapped. temperature: what logits are divided by. fp32: run the head in
    float32 outside autocast (TRL's `cast_lm_head_to_fp32`). c, h: [B, T] in the shape of labels, or None.
    """
    before = model.forward

    @functools.wraps(before)  # generate() validates its arguments against the signature
    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        coefficients: Tensor | None = None,
        entropy_coefficients: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs) if labels is None else before(*args, labels=labels, **kwargs)
        if labels is None:
            raise ValueError(
                "fused_lm_head=True scores labels, and there are none. Pass labels, -100 where not to score."
            )
        kwargs["use_cache"] = False
        out = _hidden_states(model, before, args, kwargs)
        off = torch.autocast(out.hidden.device.type, enabled=False) if fp32 else contextlib.nullcontext()
        with off:
            if fp32:
                out = out.in_float32()
            return _answer(out, labels, coefficients, entropy_coefficients, temperature)

    model.__dict__["forward"] = forward


def _hidden_states(model: nn.Module, forward: Any, args: Any, kwargs: Any) -> vk.HeadOutput:
    """What the model's forward, as it was before `attach_head`, hands to its head.

    Its outer wrappers are around this call already. Accelerate's is one autocast object, which entered twice would leave
    autocast on for good.
    """
    outer = model.__dict__["forward"]
    model.__dict__["forward"] = forward
    try:
        with vk.patch_head(model):
            out: vk.HeadOutput = model.forward(*args, **kwargs)
        return out
    finally:
        model.__dict__["forward"] = outer


def _answer(
    out: vk.HeadOutput, labels: Tensor, c: Tensor | None, h: Tensor | None, temperature: float
) -> VCPOHeadOutput:
    scored = labels != -100
    aux = getattr(out.model_output, "aux_loss", None)
    if c is not None and h is None:
        loss, stats = out.weighted_logp(labels, c, scored, temperature)
        return VCPOHeadOutput(loss, stats.logp, stats.entropy, stats.score_sqnorm, aux)
    stats = out.token_stats(labels, scored, temperature)
    if c is None or h is None:
        return VCPOHeadOutput(None, stats.logp, stats.entropy, stats.score_sqnorm, aux)
    loss = weighted(c, stats.logp) + weighted(h, stats.entropy)
    return VCPOHeadOutput(loss, stats.logp.detach(), stats.entropy.detach(), stats.score_sqnorm, aux)


def weighted(coefficients: Tensor, values: Tensor) -> Tensor:
    """sum c v, where a coefficient of 0 never meets the NaN of a dropped sequence."""
    return torch.where(coefficients != 0, coefficients * values, 0.0).sum()
