"""The table of Triton's kernels: compiled for every architecture, measured off the machine code, and what is wrong with it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot.machine_code import Resources, registers_and_shared, run_tool, spills, widest
from benchmarks.aot.table import RESULTS, more_registers
from benchmarks.aot.triton_kernels import Kernel, every_kernel
from vcpo_kernels.backends.triton.launch import FUSION

TABLE = RESULTS / "aot_triton.json"
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
COLUMNS = {
    "registers": "regs",
    "spills": "spills",
    "shared_bytes": "shared",
    "load_bits": "load",
    "store_bits": "store",
}


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
        for kernel in every_kernel(capability):
            rows[kernel.name] = asdict(resources(*compile_kernel(kernel, capability)))
        kernels[architecture] = rows
    return {"triton": triton.__version__, "kernels": kernels}


def complaints(fresh: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Everything about a fresh table that should fail the build.

    Registers depend on the compiler, so only one version's are compared; spills and widths must be right
    under any.
    """
    found, same = [], fresh["triton"] == committed["triton"]
    for architecture, capability in ARCHITECTURES.items():
        for kernel in every_kernel(capability):
            where, now = f"{architecture} {kernel.name}", fresh["kernels"][architecture][kernel.name]
            before = committed["kernels"].get(architecture, {}).get(kernel.name)
            if now["spills"]:
                found.append(f"{where}: {now['spills']} spill instructions, 0 wanted")
            for access in ("load_bits", "store_bits"):
                if now[access] < getattr(kernel, access):
                    found.append(f"{where}: {access} is {now[access]}, {getattr(kernel, access)} wanted")
            found += [f"{where}: {text}" for text in more_registers(TABLE, now, before, same)]
    return found
