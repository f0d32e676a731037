"""What users take in the fused head's place: eager torch with whole logits, torch.compile, CCE, TRL and Liger.

They give no score norm. Each is called through the function that its own trainers call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.case import Case
from benchmarks.cases.head import HEAD, Gradients, HeadInputs, gradients_error


def _gradients(x: HeadInputs, values_of: Callable[[Tensor, Tensor], Tensor], g: Tensor) -> Gradients:
    hidden, weight = x.leaves()
    values = values_of(hidden, weight)
    d_hidden, d_weight = torch.autograd.grad(values, (hidden, weight), g.to(values.dtype))
    return d_hidden, d_weight


def _eager_logp(token_ids: Tensor, upcast: bool, hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float() if upcast else logits, -1).gather(-1, token_ids[:, None])[:, 0]


def eager(x: HeadInputs, upcast: bool) -> Gradients:
    return _gradients(x, partial(_eager_logp, x.token_ids, upcast), x.g)


_compiled_logp = torch.compile(lambda ids, hidden, weight: _eager_logp(ids, True, hidden, weight), dynamic=False)


def compiled(x: HeadInputs) -> Gradients:
    return _gradients(x, lambda hidden, weight: _compiled_logp(x.token_ids, hidden, weight), x.g)


def trl(x: HeadInputs) -> Gradients:
    """TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`): its function, at its chunk size."""
    from trl.kernels import ChunkedLogProbFunction

    arguments = (None, x.token_ids, 1.0, 32768, None, 1.0, ())
    return _gradients(x, lambda hidden, weight: ChunkedLogProbFunction.apply(hidden, weight, *arguments)[0], x.g)


def liger(x: HeadInputs) -> Gradients:
    """The chunked log-probabilities under Liger's fused linear GRPO and PPO losses, at their chunk size."""
    from liger_kernel.chunked_loss import fused_linear_ppo

    function = fused_linear_ppo._ChunkedSelectiveLogProbFunction
    return _gradients(x, lambda hidden, weight: function.apply(hidden, weight, x.token_ids, None, 1.0, 4096), x.g)


def liger_flsce(x: HeadInputs) -> Gradients:
    """Liger's fused linear scaled cross entropy: per-token losses, which are -logp."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return _gradients(x, lambda hidden, weight: Function.apply(hidden, weight, x.token_ids), -x.g)


def cut_cross_entropy(x: HeadInputs) -> Gradients:
    """Its kernel on a GPU, with its gradient filter, as it comes; on a CPU the implementation it falls back to."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if x.hidden.is_cuda else "torch_compile"
    return _gradients(
        x, lambda hidden, weight: -linear_cross_entropy(hidden, weight, x.token_ids, reduction="none", impl=impl), x.g
    )


_EAGER = Case("torch eager", HEAD, partial(eager, upcast=False), gradients_error, "torch", gemms=3)
_CCE = Case("cut_cross_entropy", HEAD, cut_cross_entropy, gradients_error, "cut_cross_entropy", gemms=4, gpu_only=True)
_FLSCE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
_CHUNKED = "liger_kernel.chunked_loss.fused_linear_ppo"
PEERS = (
    _EAGER,
    Case("torch eager, fp32 softmax", HEAD, partial(eager, upcast=True), gradients_error, "torch", gemms=3),
    Case("torch.compile, fp32 softmax", HEAD, compiled, gradients_error, "torch", gemms=3),
    replace(_CCE, gemms=3, gpu_only=False),  # what it falls back to keeps the logits
    Case("TRL fused head", HEAD, trl, gradients_error, "trl.kernels", gemms=4),
    Case("Liger chunked logp", HEAD, liger, gradients_error, _CHUNKED, gemms=4),
)
# What `make gpu` holds the head against.
KERNELS = (Case("Liger FLSCE", HEAD, liger_flsce, gradients_error, _FLSCE, gemms=4), _CCE, _EAGER)
