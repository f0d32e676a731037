"""Compile every Triton kernel ahead of time, without a GPU, and hold the result against a committed table.

    python -m benchmarks.aot            # compile, print, compare with benchmarks/results/aot_triton.json
    python -m benchmarks.aot --check    # the same, and exit 1 where the comparison fails
    python -m benchmarks.aot --write    # compile and replace the table

Each kernel is compiled for sm_80, sm_90 and sm_100 at its table's launch parameters
(`backends/triton/launch.py`), with the types and alignments that a launch on real tensors has. From the
machine code come registers per thread, spills, static shared memory, and the widest access to global memory.
The check fails on a spill, on row kernels without 128-bit loads and stores, and, with the triton version that
wrote the table, on registers more than 10% above it. Nothing here runs on a GPU or says anything of speed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
    sys.exit("benchmarks.aot compiles, so it cannot run under TRITON_INTERPRET: unset it for this command.")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine_code import (
    REGISTER_SLACK,
    Resources,
    held_against,
    options_of,
    registers_and_shared,
    run_tool,
    spills,
    widest,
)
from vcpo_kernels.backends.triton import (
    group_advantages,
    outer_sqnorm,
    scale,
    score_rows,
    segment_spread,
    segment_sum,
    token_stats,
    vcpo_coefficients,
)
from vcpo_kernels.backends.triton.launch import (
    ACCESS_BYTES,
    FUSION,
    OuterLaunch,
    RowLaunch,
    SequenceLaunch,
    launches_for,
)

TABLE = Path(__file__).parent / "results" / "aot_triton.json"
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
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
    yield _forward("bf16", table.forward_softcap, softcap=True)
    yield _backward("bf16", table.backward, True, softcap=True)
    yield _forward("bf16", table.forward, aligned=False)
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


def _scale(dtype: str, launch: SequenceLaunch) -> Kernel:
    types: dict[str, str | None] = {"gradient_ptr": f"*{dtype}", "factor_ptr": "*fp32", "size": "i32"}
    constants, bits = {"BLOCK": launch.block}, 8 * ACCESS_BYTES
    return Kernel(f"scale[{dtype}]", scale.scale_kernel, types, constants, launch.num_warps, bits, bits)


def _outer_sqnorm(dtype: str, launch: OuterLaunch) -> Iterator[Kernel]:
    integers = ("p", "q", "left_stride", "right_stride", "num_rows", "pairs", "tiles", "across")
    types: dict[str, str | None] = {"partial_ptr": "*fp32", "left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}"}
    types |= {"offsets_ptr": "*i64"} | dict.fromkeys(integers, "i32")
    constants = {"T": launch.tile, "K": launch.depth, "WIDEN": False}
    for form, function in (("gram", outer_sqnorm.gram_kernel), ("tile", outer_sqnorm.tile_kernel)):
        yield Kernel(f"outer_sqnorm.{form}[{dtype}]", function, types, constants, launch.num_warps)


def sequence_kernels(capability: tuple[int, int]) -> Iterator[Kernel]:
    """Everything of sequence size, with every optional tensor; fp32 whatever the logits are."""
    launch = launches_for(capability).sequence
    types: dict[str, str | None] = {}
    types |= dict.fromkeys(_SEQUENCE_FP32, "*fp32") | dict.fromkeys(_SEQUENCE_INTEGERS, "i32")
    types |= dict.fromkeys(("mask_ptr", "ok_ptr", "group_flags_ptr"), "*u8")
    types |= dict.fromkeys(("offsets_ptr", "order_ptr", "group_ids_ptr"), "*i64")
    types |= dict.fromkeys(("moments_ptr", "counts_ptr", "group_squares_ptr"), "*fp64")
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


def compile_kernel(kernel: Kernel, capability: tuple[int, int]) -> tuple[bytes, int]:
    """The kernel's cubin for an architecture, and the dynamic shared memory that a launch asks for."""
    arguments = kernel.function.arg_names
    given = {n: kernel.types[n] for n in arguments if kernel.types.get(n) is not None}
    signature = {n: given.get(n) or "constexpr" for n in arguments}
    constants = {n: kernel.constants.get(n) for n in arguments if n not in given}
    # PyTorch allocates on 512 bytes, so that every pointer of a launch is specialised on 16.
    aligned = {(arguments.index(n),): [["tt.divisibility", 16]] for n, t in given.items() if t and t[0] == "*"}
    source = ASTSource(kernel.function, signature, constants, aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": FUSION}
    compiled = triton.compile(source, target=target, options=options)
    cubin: bytes = compiled.asm["cubin"]
    return cubin, compiled.metadata.shared


def resources(cubin: bytes, dynamic_shared: int) -> Resources:
    """Read off the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, static_shared = registers_and_shared(run_tool("cuobjdump", "--dump-resource-usage", file.name))
        sass = run_tool("nvdisasm", "-c", "-ndf", file.name)  # ndf: no dataflow analysis, half the time
    return Resources(
        registers=registers,
        spills=spills(sass),
        shared_bytes=static_shared + dynamic_shared,
        load_bits=widest(sass, "LDG"),
        store_bits=widest(sass, "STG"),
    )


def measure() -> dict[str, Any]:
    """The whole table: triton's version, and each architecture's kernels by name."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for architecture, capability in ARCHITECTURES.items():
        rows = {}
        for kernel in (*row_kernels(capability), *sequence_kernels(capability)):
            rows[kernel.name] = asdict(resources(*compile_kernel(kernel, capability)))
        kernels[architecture] = rows
    return {"triton": triton.__version__, "kernels": kernels}


def complaints(fresh: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Everything about a fresh table that should fail the build.

    Registers depend on the compiler, so only one version's are compared; spills and widths must be right
    under any.
    """
    found = []
    for architecture, capability in ARCHITECTURES.items():
        for kernel in (*row_kernels(capability), *sequence_kernels(capability)):
            where, now = f"{architecture} {kernel.name}", fresh["kernels"][architecture][kernel.name]
            before = committed["kernels"].get(architecture, {}).get(kernel.name)
            if now["spills"]:
                found.append(f"{where}: {now['spills']} spill instructions, 0 wanted")
            for access in ("load_bits", "store_bits"):
                if now[access] < getattr(kernel, access):
                    found.append(f"{where}: {access} is {now[access]}, {getattr(kernel, access)} wanted")
            if before is None:
                found.append(f"{where}: not in {TABLE.name}; run with --write")
            elif fresh["triton"] == committed["triton"]:
                allowed = REGISTER_SLACK * before["registers"]
                if now["registers"] > allowed:
                    found.append(f"{where}: {now['registers']} registers, was {before['registers']}")
    return found


def report(table: dict[str, Any]) -> str:
    """The table as text."""
    lines = [f"triton {table['triton']}", f"{'':52}  regs  spills  shared  load  store"]
    for architecture, rows in table["kernels"].items():
        for name, r in rows.items():
            numbers = f"{r['registers']:6}{r['spills']:8}{r['shared_bytes']:8}{r['load_bits']:6}{r['store_bits']:7}"
            lines.append(f"{architecture + ' ' + name:52}{numbers}")
    return "\n".join(lines)


def main() -> int:
    options = options_of("benchmarks.aot", __doc__)
    fresh = measure()
    print(report(fresh))
    return held_against(TABLE, fresh, "triton", complaints, options)


if __name__ == "__main__":
    sys.exit(main())
