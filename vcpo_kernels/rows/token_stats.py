"""token_stats: logp, entropy, score norm and log-sum-exp of every row of the logits, in one pass over them.

Layer: rows [N, V] -> tokens [N]. The op `vcpo_kernels::token_stats`, its backward (out of place and in place), their
fakes and autograd, and the public function with its checks. The kernels are in `backends/<name>/token_stats.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks, registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import forget_detached_casts
from vcpo_kernels.core.library import define_op, nothing_returned
from vcpo_kernels.core.trees import TensorTree
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows import views
from vcpo_kernels.rows.kept_logits import logits_are_kept
from vcpo_kernels.rows.statistics import RETURNS, SETTINGS, RowStatistics
from vcpo_kernels.rows.vocabulary_shards import checked_shard, statistics_of_shard

LEAST_TEMPERATURE = 1e-30
# softcap / temperature multiplies the rounding of tanh: 500 times 2^-24, and a little, is what log p may lack.
LARGEST_SOFTCAP_RATIO = 500.0


@dataclass(frozen=True)
class TokenStats(TensorTree):
    """Statistics of each token, in the shape of `token_ids`, fp32 (float64 for float64 logits); 0 where masked out.

    logp: log pi(y_t), x_y - lse. Differentiable.
    entropy: -sum_v p_v log p_v, in nats. Differentiable.
    score_sqnorm: (1 - p_y)^2 + sum_{v != y} p_v^2, the squared norm of d logp / d x: the 1 - 2 p_y + sum p^2 of
        arXiv 2602.07078. No gradient.
    lse: log sum_v exp x_v, with x = softcap(logits) / temperature. No gradient.
    shifted: the statistics came from `shift=True`, so entry 0 of each sequence has no prediction and counts nowhere.
    mask: the mask they were taken with (None: all), outside of which they say nothing.
    """

    STATIC = ("shifted",)

    logp: Tensor
    entropy: Tensor
    score_sqnorm: Tensor
    lse: Tensor
    shifted: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.shifted and not torch.compiler.is_compiling():  # so that `segments.sum(stats.logp)` knows it too
            for name in RowStatistics._fields:
                if isinstance(value := getattr(self, name), Tensor):
                    value._vcpo_shifted = True  # type: ignore[attr-defined]

    @property
    def sum_p_squared(self) -> Tensor:
        """sum_v p_v^2 (verl's `sum_pi_squared`), from score_sqnorm - 1 + 2 p_y: absolute error about 1e-7.

        1 at masked-out entries, whose logp and score_sqnorm are 0.
        """
        return self.score_sqnorm - 1 + 2 * self.logp.detach().exp()

    @classmethod
    def of(cls, statistics: RowStatistics, shifted: bool, mask: Tensor | None) -> TokenStats:
        """Those that carry a gradient keep it."""
        logp, entropy, score_sqnorm, lse = statistics
        return cls(logp, entropy, score_sqnorm.detach(), lse.detach(), shifted, mask)

    @classmethod
    def stacked(cls, parts: Sequence[TokenStats]) -> TokenStats:
        """The statistics of slices along a new first dimension."""
        fields = {name: torch.stack([getattr(p, name) for p in parts]) for name in RowStatistics._fields}
        masks = [p.mask for p in parts if p.mask is not None]
        return cls(**fields, shifted=parts[0].shifted, mask=torch.stack(masks) if masks else None)


def is_shifted(values: Tensor) -> bool:
    """Whether these are statistics of a shifted pass, as `TokenStats` marks them; not known of what is computed from them."""
    return getattr(values, "_vcpo_shifted", False)


def check_stats(check: Check, stats: object) -> None:
    """Raise unless `stats` is a TokenStats: a bare logp is what callers pass by mistake."""
    if not isinstance(stats, TokenStats):
        raise check.type_error(f"stats must be the TokenStats that token_stats returned, got {checks.describe(stats)}.")
    forget_detached_casts(stats.logp)


def token_stats(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: bool = False,
    inplace_backward: bool = False,
    vocabulary: VocabularyShard | None = None,
) -> TokenStats:
    """Log-probability, entropy and score norm of every token, reading the logits once.

    With x = softcap(logits) / temperature, softcap(z) = c tanh(z / c), p = softmax(x) and y the sampled token:
    logp = x_y - lse, entropy = -sum p log p, score_sqnorm = (1 - p_y)^2 + sum_{v != y} p_v^2 (free of cancellation:
    relative error <= 1e-3 down to p_y = 1 - 1e-6). The backward pass reads the logits once more and writes
    d logits = g (1[v = y] - p) - h p (log p + entropy), for upstream gradients g to logp and h to entropy.

    Args:
        logits: [.., V], bfloat16, float16, float32 (or float64: reference backend). Any strides, last dimension
            contiguous; a view is never copied. -inf entries (masked vocabulary) contribute nothing.
        token_ids: [..], int64 or int32, in [0, V) where the mask is true; elsewhere never looked at (-100 is fine).
        mask: [..], true where the token counts (bool is free; integers and 0/1 floats are converted). None: all count.
        temperature: divides the logits, >= 1e-30. Near-greedy ones are as exact as others.
        softcap: c above (Gemma-2), or None. At most 500 times the temperature, unless logits are float64.
        shift: take a causal LM's raw output: logits [.., T, V] at position t predict token t + 1. Outputs keep
            the shape of token_ids, entry t is about token t, and entry 0 (no prediction) is 0 and takes no gradient.
        inplace_backward: write the gradient over the logits instead of allocating [.., V] again. The logits' version
            counter is bumped, so autograd raises if anything else still needs them. Ignored under torch.compile.
        vocabulary: the logits are this rank's shard [.., v] of rows whose entries the ranks of a group share (tensor
            parallelism); v may be 0 or differ by rank, everything else is the same on all. Statistics are those of the
            whole rows, the same bits on every rank, at one gather of 20 bytes a token; the gradient is the shard's and
            sends nothing. Every rank of the group has to make the call. None: rows are whole, or logits are a DTensor that
            is sharded in its last dimension, whose shards are then taken.

    Returns:
        TokenStats, each field in the shape of token_ids.

    Raises:
        TypeError, ValueError: naming the argument, what it got, what it wants. An out-of-range id at a valid position
        is a ValueError on the CPU; on a GPU its logp is NaN, which `vcpo_loss` drops and counts.

    >>> import torch, vcpo_kernels as vk
    >>> logits = torch.tensor([[0.0, 0.0], [0.0, float("-inf")]], requires_grad=True)
    >>> stats = vk.token_stats(logits, torch.tensor([1, 0]))
    >>> stats.logp.detach()
    tensor([-0.6931,  0.0000])
    >>> stats.score_sqnorm
    tensor([0.5000, 0.0000])
    >>> stats.logp.sum().backward()
    >>> logits.grad[0]
    tensor([-0.5000,  0.5000])
    """
    check = Check("token_stats")
    logits, shard = checked_shard(check, logits, vocabulary, "inplace_backward" if inplace_backward else None)
    token_ids, mask, temperature, softcap = checked(
        check, logits, token_ids, mask, temperature, softcap, shift, least_width=1 if shard is None else 0
    )
    if inplace_backward:
        check.overwritable("inplace_backward", logits)
    if shard is not None:
        outputs = statistics_of_shard(logits, token_ids, mask, temperature, softcap, shift, inplace_backward, shard)
        return TokenStats.of(outputs, shift, mask)
    if not views.viewable(logits, shift):  # more than two batch dimensions that no stride can merge: one call per slice
        masks = mask if mask is not None else [None] * len(logits)
        return TokenStats.stacked(
            [
                token_stats(*rows, temperature, softcap, shift, inplace_backward)
                for rows in zip(logits, token_ids, masks, strict=True)
            ]
        )
    inplace = inplace_backward and not torch.compiler.is_compiling()
    outputs = _op(logits, token_ids, mask, temperature, softcap, shift, inplace)
    return TokenStats.of(RowStatistics(*outputs), shift, mask)


def checked(
    check: Check,
    logits: Any,
    token_ids: Any,
    mask: Any,
    temperature: Any,
    softcap: Any,
    shift: Any,
    least_width: int = 1,
) -> tuple[Tensor, Tensor | None, float, float | None]:
    """ids as int64, the mask as bool, the numbers as floats; or an error naming the argument."""
    check.tensor("logits", logits, checks.FLOAT_DTYPES)
    if logits.dim() == 0 or logits.shape[-1] < least_width:
        raise check.value_error(f"logits must be [.., V] with V >= 1, got {checks.describe(logits)}.")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise check.value_error(
            f"logits must be contiguous in the last dimension, got strides {logits.stride()} for shape "
            f"{tuple(logits.shape)}. Keep the vocabulary last in memory, or call logits.contiguous() (a copy)."
        )
    return checked_tokens(check, "logits", "V", logits, token_ids, mask, temperature, softcap, shift)


def checked_tokens(
    check: Check,
    name: str,
    width: str,
    rows: Tensor,
    token_ids: Any,
    mask: Any,
    temperature: Any,
    softcap: Any,
    shift: Any,
) -> tuple[Tensor, Tensor | None, float, float | None]:
    """What logits and hidden states have beside them, checked against `rows` [.., width], which the caller knows by `name`."""
    check.tensor("token_ids", token_ids, checks.ID_DTYPES, "Convert it: token_ids.long().")
    fix = f"With {name}[:, :-1] pass token_ids[:, 1:], or pass both whole with shift=True."
    check.shape("token_ids", token_ids, rows.shape[:-1], f"{name}.shape[:-1]", fix)
    check.same_device("token_ids", token_ids, name, rows)
    if mask is not None:
        mask = check.mask("mask", mask)
        check.shape("mask", mask, token_ids.shape, "token_ids.shape")
        check.same_device("mask", mask, name, rows)
    if shift and rows.dim() < 2:
        raise check.value_error(f"shift=True wants {name} [.., T, {width}], got {checks.describe(rows)}.")
    temperature = check.positive_float("temperature", temperature)
    softcap = check.optional_positive_float("softcap", softcap)
    if rows.dtype != torch.float64:
        _check_range(check, temperature, softcap)
    forget_detached_casts(rows)
    return token_ids.to(torch.int64), mask, temperature, softcap


def _check_range(check: Check, temperature: float, softcap: float | None) -> None:
    """What fp32 has no exponents or digits for is an error, before it is a NaN."""
    if temperature < LEAST_TEMPERATURE:
        raise check.value_error(
            f"temperature must be at least {LEAST_TEMPERATURE:g}, got {temperature:g}: a gradient, a multiple of "
            "1 / temperature, leaves fp32's range. 1e-6 is as good as greedy."
        )
    if softcap is not None and softcap > LARGEST_SOFTCAP_RATIO * temperature:
        raise check.value_error(
            f"softcap / temperature must be at most {LARGEST_SOFTCAP_RATIO:g}, got {softcap:g} / {temperature:g}: log p would "
            f"lack digits, since tanh has no more than fp32's. Pass temperature >= {softcap / LARGEST_SOFTCAP_RATIO:g}, or "
            "logits in float64."
        )


# --- the ops ---------------------------------------------------------------------------------------------------------


def _token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, softcap: float | None, shift: bool,
    inplace_backward: bool,
) -> RowStatistics:  # fmt: skip
    backend = registry.select("token_stats", logits.device, logits.dtype, logits.shape[-1])
    rows = views.rows_of(logits, shift)
    ids, mask = views.beside(token_ids, rows), views.beside(mask, rows)
    views.check_ids("token_stats", ids, mask, logits.shape[-1], shift)
    outputs = backend.forward(rows, ids, mask, temperature=temperature, softcap=softcap, shift=shift)
    return RowStatistics(*outputs).map(lambda values: values.view(token_ids.shape))


def _fake(logits: Tensor, token_ids: Tensor, *rest: Any) -> RowStatistics:
    return RowStatistics.empty(token_ids.shape, logits)


def _backward_into(
    out: Tensor, logits: Tensor, token_ids: Tensor, mask: Tensor | None, logp: Tensor, entropy: Tensor, lse: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, temperature: float, softcap: float | None, shift: bool,
) -> None:  # fmt: skip
    rows = views.rows_of(logits, shift)
    out_rows = rows if out is logits else out.view(rows.shape)
    token_sized = (token_ids, mask, logp, entropy, lse, grad_logp, grad_entropy)
    backend = registry.select("token_stats", logits.device, logits.dtype, logits.shape[-1])
    backend.backward(
        out_rows, rows, *(views.beside(t, rows) for t in token_sized),
        temperature=temperature, softcap=softcap, shift=shift,
    )  # fmt: skip


def _fake_backward(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _token_stats_backward(logits: Tensor, *rest: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(out, logits, *rest)
    return out


def _token_stats_backward_(logits: Tensor, *rest: Any) -> None:
    _backward_into(logits, logits, *rest)
    torch.autograd.graph.increment_version(logits)  # kernels write by address, which autograd does not see


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, mask, ctx.temperature, ctx.softcap, ctx.shift, ctx.inplace = inputs
    stats = RowStatistics(*output)
    ctx.save_for_backward(logits, token_ids, mask, stats.logp, stats.entropy, stats.lse)
    ctx.set_materialize_grads(False)  # no gradient to entropy is the common case, and has a cheaper kernel


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if grad_logp is None and grad_entropy is None:
        return (None, *nothing)
    logits, *saved = ctx.saved_tensors
    arguments = (logits, *saved, grad_logp, grad_entropy, ctx.temperature, ctx.softcap, ctx.shift)
    if not ctx.inplace or logits_are_kept():
        return (_backward_op(*arguments), *nothing)
    written = logits.detach()  # shares storage and version counter; not a view of the graph
    _backward_op_(written, *arguments[1:])
    return (written, *nothing)


_SAVED = (
    "Tensor token_ids, Tensor? mask, Tensor logp, Tensor entropy, Tensor lse, Tensor? grad_logp, Tensor? grad_entropy, "
    + SETTINGS
)
_op = define_op(
    f"token_stats(Tensor logits, Tensor token_ids, Tensor? mask, {SETTINGS}, bool inplace_backward) -> ({RETURNS})",
    _token_stats, _fake, _setup_context, _backward, bypass=True,
)  # fmt: skip
_backward_op = define_op(
    f"token_stats_backward(Tensor logits, {_SAVED}) -> Tensor", _token_stats_backward, _fake_backward
)
_backward_op_ = define_op(
    f"token_stats_backward_(Tensor(a!) logits, {_SAVED}) -> ()", _token_stats_backward_, nothing_returned
)
