"""What the compiler made of a kernel, read off its machine code by the tools that triton brings. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Resources:
    """registers: per thread. spills: local-memory instructions. shared_bytes: static, and dynamic where the launch is known.

    load_bits, store_bits: widest access to global memory.
    """

    registers: int
    spills: int
    shared_bytes: int
    load_bits: int
    store_bits: int


def run_tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Output of cuobjdump or nvdisasm."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout


def registers_and_shared(usage: str) -> tuple[int, int]:
    """From one function's line of `cuobjdump --dump-resource-usage`."""
    registers, shared = (int(re.findall(rf"\b{what}:(\d+)", usage)[0]) for what in ("REG", "SHARED"))
    return registers, shared


def spills(sass: str) -> int:
    """Instructions that go to local memory."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def widest(sass: str, instruction: str) -> int:
    """Bits of the widest access; one without a width in its name moves 32."""
    suffixes = re.findall(rf"\b{instruction}((?:\.\w+)*)", sass)
    bits = (re.search(r"\.(?:[US])?(8|16|64|128|256)\b", s) for s in suffixes)
    return max((int(b[1]) if b else 32 for b in bits), default=0)
