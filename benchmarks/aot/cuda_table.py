"""The table of the CUDA kernels: read off the installed extension, and what is wrong with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.aot.machine_code import registers_and_shared, run_tool, spills, widest
from benchmarks.aot.table import RESULTS, more_registers

TABLE = RESULTS / "aot_cuda.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
BITS = 128
COLUMNS = {
    "registers": "regs", "stack": "stack", "spills": "spills", "shared_bytes": "shared", "load_bits": "load",
    "bulk_copies": "bulk", "store_bits": "store",
}  # fmt: skip
# Mangled template arguments, as the table writes them.
_WORDS = (("BFloat16", "bf16"), ("Float16", "fp16"), ("float", "fp32"))


def readable(signature: str) -> str:
    """A kernel's name without its namespace and parameters, dtypes and flags in words.

    >>> readable("void vcpo::token_stats_forward_kernel<vcpo::BulkStream<vcpo::BFloat16, 4, 4, 3>, true, 6>(vcpo::Rows)")
    'token_stats.forward[bulk, bf16, softcap]'
    >>> readable("void vcpo::token_stats_forward_kernel<vcpo::BulkStream<float, 4, 4, 3>, false, 6, vcpo::ShardStatesOut>()")
    'token_states[bulk, fp32]'
    """
    name = re.sub(r"^void |vcpo::|\(.*", "", signature)
    for long, short in _WORDS:
        name = re.sub(rf"\b{long}\b", short, name)
    dtype = re.search(r"\b(bf16|fp16|fp32)\b", name)
    assert dtype is not None, signature
    flags = re.findall(r"\b(true|false)\b", name)
    if name.startswith("token_stats_backward"):
        aligned, softcap, entropy = (flag == "true" for flag in flags)
        words = ["" if aligned else "direct", dtype[1], "entropy" * entropy, "softcap" * softcap]
        return f"token_stats.backward[{', '.join(w for w in words if w)}]"
    path = "cluster" if "cluster" in name else name[name.index("<") + 1 :].split("Stream")[0].lower()
    words = [path, dtype[1], "softcap" * (flags[-1] == "true")]
    forward = "token_states" if "ShardStatesOut" in name else "token_stats.forward"
    op = forward if name.startswith("token_stats") else "score_rows"
    return f"{op}[{', '.join(w for w in words if w)}]"


def runs_on(name: str, architecture: str) -> bool:
    """Bulk copies and clusters are of sm_90 and later, which have no use for cp.async; the rest is an empty shell."""
    old = architecture == "sm_80"
    if "bulk" in name or "cluster" in name:
        return not old
    return old or "[async" not in name or name.startswith("score_rows")


def measure(extension: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Each architecture's kernels by name."""
    table: dict[str, dict[str, dict[str, int]]] = {architecture: {} for architecture in ARCHITECTURES}
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", "all", extension.resolve(), folder=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            table[cubin.name.split(".")[-2]] |= _kernels_of(cubin)
    return {a: {n: table[a][n] for n in sorted(table[a]) if runs_on(n, a)} for a in ARCHITECTURES}


def _kernels_of(cubin: Path) -> dict[str, dict[str, int]]:
    usage = dict(re.findall(r"Function (\S+):\n\s*(.*)", run_tool("cuobjdump", "--dump-resource-usage", cubin)))
    code = run_tool("nvdisasm", "-c", "-ndf", cubin)
    parts = re.split(r"^\.text\.(\S+):$", code, flags=re.MULTILINE)
    rows = {}
    for mangled, sass in zip(parts[1::2], parts[2::2], strict=True):
        registers, shared = registers_and_shared(usage[mangled])
        rows[readable(_demangled(mangled))] = {
            "registers": registers,
            "stack": int(re.findall(r"\bSTACK:(\d+)", usage[mangled])[0]),
            "spills": spills(sass),
            "shared_bytes": shared,
            "load_bits": max(widest(sass, "LDG"), widest(sass, "LDGSTS")),
            "bulk_copies": len(re.findall(r"\bUBLKCP\b", sass)),
            "store_bits": widest(sass, "STG"),
        }
    return rows


def _demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def complaints(fresh: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Everything about a fresh table that should fail the build."""
    found, same = [], fresh["nvcc"] == committed["nvcc"]
    for architecture in ARCHITECTURES:
        now, before = fresh["kernels"][architecture], committed["kernels"].get(architecture, {})
        found += [f"{architecture} {name}: gone; run with --write" for name in before if name not in now]
        for name, row in now.items():
            texts = [*_complaints_of(name, row), *more_registers(TABLE, row, before.get(name), same)]
            found += [f"{architecture} {name}: {text}" for text in texts]
    return found


def _complaints_of(name: str, row: dict[str, Any]) -> list[str]:
    found = [f"{row[what]} {what}, 0 wanted" for what in ("spills", "stack") if row[what]]
    if "direct" in name:  # rows that are not aligned are taken entry by entry
        return found
    if row["load_bits"] < BITS and not row["bulk_copies"]:
        found.append(f"load_bits is {row['load_bits']}, {BITS} or a bulk copy wanted")
    if row["store_bits"] < BITS and not name.startswith(("token_stats.forward", "token_states")):
        found.append(f"store_bits is {row['store_bits']}, {BITS} wanted")
    return found


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "not found"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[-1].split(",")[0]
