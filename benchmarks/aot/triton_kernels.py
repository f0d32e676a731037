"""Every Triton kernel with the types, constants and launch parameters that a launch on real tensors has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vcpo_kernels.backends.triton import (
    group_advantages,
    merged_statistics,
    outer_sqnorm,
    scale,
    score_rows,
    segment_spread,
    segment_sum,
    token_states,
    token_stats,
    vcpo_coefficients,
)
from vcpo_kernels.backends.triton.launch import (
    ACCESS_BYTES,
    OuterLaunch,
    RowLaunch,
    SequenceLaunch,
    launches_for,
)

ROW_TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Kernel:
    """One kernel as one launch would compile it.

    types: of the run-time arguments by name, "*bf16" a pointer, None an argument that is absent. constants:
    constexprs. load_bits, store_bits: what its widest global access must be; 0: anything will do.
    """

    name: str
    function: Any
    types: dict[str, str | None]
    constants: dict[str, Any]
    num_warps: int
    load_bits: int = 0
    store_bits: int = 0


def every_kernel(capability: tuple[int, int]) -> Iterator[Kernel]:
    yield from row_kernels(capability)
    yield from sequence_kernels(capability)


def row_kernels(capability: tuple[int, int]) -> Iterator[Kernel]:
    """token_stats, both passes, score_rows and scale for every dtype; the variants that cost more once, in bf16."""
    table = launches_for(capability)
    for dtype in ROW_TYPES:
        yield _forward(dtype, table.forward)
        for entropy in (False, True):
            yield _backward(dtype, table.backward, entropy)
        yield _score_rows(dtype, table.score)
        yield _scale(dtype, table.scale)
        yield from _outer_sqnorm(dtype, table.outer_fp32 if dtype == "fp32" else table.outer)
        yield _states(dtype, table.forward)
    yield _forward("bf16", table.forward_softcap, softcap=True)
    yield _backward("bf16", table.backward, True, softcap=True)
    yield _forward("bf16", table.forward, aligned=False)
    yield _merge(table.sequence)
    yield _backward("bf16", table.backward, True, aligned=False)
    yield _backward("bf16", table.backward, True, block=True)
    yield _score_rows("bf16", table.score_softcap, softcap=True)
    yield _score_rows("bf16", table.score, aligned=False)
    yield _score_rows("bf16", table.score_softcap, softcap=True, aligned=False)


_ROW_INTEGERS = (
    "inner",
    "vocabulary",
    "outer_stride",
    "inner_stride",
    "out_outer_stride",
    "out_inner_stride",
    "shift",
)


def _row_bits(aligned: bool) -> int:
    return 8 * ACCESS_BYTES if aligned else 0


def _row_constants(dtype: str, launch: RowLaunch, aligned: bool) -> dict[str, int]:
    width = ACCESS_BYTES // ROW_TYPES[dtype]
    vec = width if aligned else 1
    return {"VEC": vec, "VECTORS": launch.vectors * width // vec, "LANES": launch.lanes}


def _row_types(dtype: str, softcap: bool, *token_sized: str) -> dict[str, str | None]:
    rows: dict[str, str | None] = {
        "out_ptr": f"*{dtype}",
        "rows_ptr": f"*{dtype}",
        "ids_ptr": "*i64",
        "mask_ptr": "*u8",
    }
    scalars = dict.fromkeys(_ROW_INTEGERS, "i32") | {"temperature": "fp32", "softcap": "fp32" if softcap else None}
    return rows | dict.fromkeys(token_sized, "*fp32") | scalars


_STATISTICS = ("logp_ptr", "entropy_ptr", "score_ptr", "lse_ptr")


def _forward(dtype: str, launch: RowLaunch, softcap: bool = False, aligned: bool = True) -> Kernel:
    types = _row_types(dtype, softcap, *_STATISTICS)
    name = f"token_stats.forward[{dtype}{', softcap' * softcap}{', unaligned' * (not aligned)}]"
    constants = _row_constants(dtype, launch, aligned)
    return Kernel(name, token_stats.forward_kernel, types, constants, launch.num_warps, _row_bits(aligned))


def _states(dtype: str, launch: RowLaunch) -> Kernel:
    types = _row_types(dtype, False, "states_ptr") | {"tokens": "i32"}
    constants = _row_constants(dtype, launch, True)
    return Kernel(
        f"token_states[{dtype}]", token_states.states_kernel, types, constants, launch.num_warps, _row_bits(True)
    )


def _backward(
    dtype: str, launch: RowLaunch, entropy: bool, block: bool = False, softcap: bool = False, aligned: bool = True
) -> Kernel:
    """block: of a vocabulary, with the targets' logits given."""
    optional = ("grad_entropy_ptr",) * entropy + ("target_logits_ptr",) * block
    types = _row_types(dtype, softcap, "logp_ptr", "entropy_ptr", "lse_ptr", "grad_logp_ptr", *optional)
    variant = f"{', entropy' * entropy}{', block' * block}{', softcap' * softcap}{', unaligned' * (not aligned)}"
    constants = _row_constants(dtype, launch, aligned)
    name, bits = f"token_stats.backward[{dtype}{variant}]", _row_bits(aligned)
    return Kernel(name, token_stats.backward_kernel, types, constants, launch.num_warps, bits, bits)


def _score_rows(dtype: str, launch: RowLaunch, softcap: bool = False, aligned: bool = True) -> Kernel:
    types = _row_types(dtype, softcap, "coefficients_ptr", *_STATISTICS)
    constants = _row_constants(dtype, launch, aligned)
    name = f"score_rows[{dtype}{', softcap' * softcap}{', unaligned' * (not aligned)}]"
    bits = _row_bits(aligned)
    return Kernel(name, score_rows.score_rows_kernel, types, constants, launch.num_warps, bits, bits)


def _merge(launch: SequenceLaunch) -> Kernel:
    types: dict[str, str | None] = {"states_ptr": "*fp32", "ids_ptr": "*i64", "valid_ptr": "*u8", "merged_ptr": "*fp32"}
    types |= dict.fromkeys(("shards", "tokens", "size"), "i32") | {"temperature": "fp32", "softcap": "fp32"}
    function = merged_statistics.merge_kernel
    return Kernel("merged_statistics[softcap]", function, types, {"BLOCK": launch.block}, launch.num_warps)


def _scale(dtype: str, launch: SequenceLaunch) -> Kernel:
    types: dict[str, str | None] = {"gradient_ptr": f"*{dtype}", "factor_ptr": "*fp32", "size": "i32"}
    constants, bits = {"BLOCK": launch.block}, 8 * ACCESS_BYTES
    return Kernel(f"scale[{dtype}]", scale.scale_kernel, types, constants, launch.num_warps, bits, bits)


def _outer_sqnorm(dtype: str, launch: OuterLaunch) -> Iterator[Kernel]:
    integers = ("p", "q", "left_stride", "right_stride", "num_rows", "pairs", "tiles", "across")
    types: dict[str, str | None] = {"partial_ptr": "*fp32", "left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}"}
    types |= {"offsets_ptr": "*i64"} | dict.fromkeys(integers, "i32")
    constants = {"T": launch.tile, "K": launch.depth, "WIDEN": False}
    for form, function in (("ghost", outer_sqnorm.ghost_kernel), ("instantiated", outer_sqnorm.instantiated_kernel)):
        yield Kernel(f"outer_sqnorm.{form}[{dtype}]", function, types, constants, launch.num_warps)


def sequence_kernels(capability: tuple[int, int]) -> Iterator[Kernel]:
    """Everything of sequence size, with every optional tensor; fp32 whatever the logits are."""
    launch = launches_for(capability).sequence
    types: dict[str, str | None] = {}
    types |= dict.fromkeys(_SEQUENCE_FP32, "*fp32") | dict.fromkeys(_SEQUENCE_INTEGERS, "i32")
    types |= dict.fromkeys(("mask_ptr", "ok_ptr", "group_flags_ptr"), "*u8")
    types |= dict.fromkeys(("offsets_ptr", "order_ptr", "group_ids_ptr"), "*i64")
    types |= dict.fromkeys(("moments_ptr", "counts_ptr", "group_squares_ptr", "ratios_ptr"), "*fp64")
    types |= dict.fromkeys(("max_weight", "ess_max_weight", "num_sequences", "max_tokens", "usable_below"), "fp32")
    constants: dict[str, Any] = {"BLOCK": launch.block, "SKIP_FIRST": True, "NORMALIZE": True}
    constants |= {"WEIGHTING": "estimator", "AGGREGATION": "seq-mean-token-mean"}
    for name, function in (
        ("segment_sum", segment_sum.segment_sum_kernel),
        ("segment_spread", segment_spread.segment_spread_kernel),
        ("vcpo_coefficients.sequence", vcpo_coefficients.sequence_kernel),
        ("vcpo_coefficients.batch", vcpo_coefficients.batch_kernel),
        ("vcpo_coefficients.group", group_advantages.group_kernel),
        ("vcpo_coefficients.metrics", vcpo_coefficients.metrics_kernel),
    ):
        # The same name is a count of tokens in one kernel and the aggregation's float divisor in the other.
        own = types | {"num_tokens": "fp32" if name.endswith("batch") else "i32"}
        yield Kernel(name, function, own, constants, launch.num_warps)


_SEQUENCE_INTEGERS = ("num_groups", "batch", "group_size")
_SEQUENCE_FP32 = tuple(
    f"{name}_ptr"
    for name in (
        "total", "values", "tokens", "per_sequence", "log_w", "lengths", "norms", "advantages",
        "coefficients", "logp", "behavior", "scores", "score_norms", "rewards", "metrics", "baselines",
    )
)  # fmt: skip
