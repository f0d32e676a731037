"""What each backend supports, why not where it does not, and which one serves a call.

A backend has a package under `vcpo_kernels.backends` with one module per op, imported at first use. It declares what it
supports as data (`Backend`); `select` walks `ORDER` for the tensor's device and takes the first backend without
objections. `use_backend` forces one; where it objects, the error lists every backend with its reasons.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch

from vcpo_kernels.core import installation, measured
from vcpo_kernels.core.checks import has_float64

ROW_OPS = frozenset({"token_stats", "score_rows"})
SHARD_OPS = frozenset({"token_states"})  # of rows too, whose vocabulary several ranks share
MERGE_OPS = frozenset({"merged_statistics"})
SEQUENCE_OPS = frozenset({"segment_sum", "segment_spread", "vcpo_coefficients"})
GRADIENT_OPS = frozenset({"scale"})
NORM_OPS = frozenset({"outer_sqnorm"})

HALF_AND_SINGLE = frozenset({torch.bfloat16, torch.float16, torch.float32})
SINGLE_AND_DOUBLE = frozenset({torch.float32, torch.float64})


@dataclass(frozen=True)
class Backend:
    """One implementation of some ops.

    ops, devices, dtypes: what it serves (dtypes are those of the largest input; dtypes_of: of an op that differs).
    probe: None where it can run here, else the reason. relative_error: bound on its fp32 outputs against float64, as a
    factor of (1 + |value|); tests read it.
    min_capability: the oldest GPU that it runs on; None: any device's. package: where its modules are; None: under its name.
    """

    name: str
    ops: frozenset[str]
    devices: frozenset[str] | None  # None: any
    dtypes: frozenset[torch.dtype]
    probe: Callable[[], str | None]
    relative_error: float = 2e-6
    min_capability: tuple[int, int] | None = None
    package: str | None = None
    dtypes_of: Mapping[str, frozenset[torch.dtype]] = field(default_factory=dict)

    def takes(self, op: str, dtype: torch.dtype) -> bool:
        return dtype in self.dtypes_of.get(op, self.dtypes)


@cache
def native_problem() -> str | None:
    """None where the compiled extension loads, else why not."""
    try:
        extension = importlib.import_module("vcpo_kernels._native")
    except Exception as error:  # an unfit library raises other errors too
        return f"the compiled extension vcpo_kernels._native does not load ({error}); {installation.advice()}"
    if not installation.owns(extension):
        return (
            f"the compiled extension that was found, {extension.__file__}, is another installation's; "
            f"{installation.advice()}"
        )
    return None


@cache
def cuda_problem() -> str | None:
    """None where the compiled extension has the CUDA kernels and PyTorch has a device for them, else why not."""
    if (problem := native_problem()) is not None:
        return problem
    if not importlib.import_module("vcpo_kernels._native").cuda:
        return (
            "the compiled extension was built without nvcc; install the CUDA toolkit and run "
            "`CMAKE_ARGS=-DVCPO_CUDA=ON pip install -e .` in the source folder"
        )
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "PyTorch has no CUDA device here"
    return None


@cache
def triton_problem() -> str | None:
    """None where triton imports, else why not. (It may import and still have no device to run on.)"""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken triton raises far more than ImportError, and must not take us along
        return f"triton does not import ({type(error).__name__}: {error}); `pip install triton` (Linux only)"
    return None


def triton_interpreted() -> bool:
    """True where triton kernels run through its interpreter: TRITON_INTERPRET was set before triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            name="reference",
            ops=ROW_OPS | SHARD_OPS | MERGE_OPS | SEQUENCE_OPS | GRADIENT_OPS | NORM_OPS,
            devices=None,
            dtypes=HALF_AND_SINGLE | {torch.float64},
            probe=lambda: None,
        ),
        Backend(
            name="native",
            ops=ROW_OPS | SHARD_OPS | SEQUENCE_OPS,
            devices=frozenset({"cpu"}),
            dtypes=HALF_AND_SINGLE,
            probe=native_problem,
            dtypes_of=dict.fromkeys(SEQUENCE_OPS, SINGLE_AND_DOUBLE),
        ),
        Backend(
            name="triton",
            ops=ROW_OPS | SHARD_OPS | MERGE_OPS | SEQUENCE_OPS | GRADIENT_OPS | NORM_OPS,
            devices=frozenset({"cuda"}),
            dtypes=HALF_AND_SINGLE,
            probe=triton_problem,
        ),
        Backend(
            name="cuda",
            ops=ROW_OPS | SHARD_OPS,
            devices=frozenset({"cuda"}),
            dtypes=HALF_AND_SINGLE,
            probe=cuda_problem,
            min_capability=(8, 0),
            package="native",  # the same extension, told another place
        ),
    )
}

# First without objections serves. A backend that is not listed for a device can still be forced there if it supports it.
# On a GPU, CUDA goes before Triton where it was measured to win (`measured.py`).
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
DEFAULT_ORDER = ("reference",)

_forced: list[str] = []


def objections(name: str, op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Every reason why backend `name` cannot serve `op` on these tensors; empty where it can."""
    backend = BACKENDS[name]
    reasons = []
    if op not in backend.ops:
        reasons.append(f"has no {op}")
    if backend.devices is not None and device.type not in backend.devices:
        if not (name == "triton" and device.type == "cpu"):
            reasons.append(f"runs on {', '.join(sorted(backend.devices))} tensors, not on {device.type}")
        elif not triton_interpreted():
            interpreter = "runs on cpu tensors only under its interpreter: set TRITON_INTERPRET=1 before the import"
            reasons.append(backend.probe() or interpreter)
    if not backend.takes(op, dtype):
        reasons.append(f"does not take {str(dtype).removeprefix('torch.')}")
    if not reasons and (problem := backend.probe()) is not None:
        reasons.append(problem)
    oldest = backend.min_capability
    if not reasons and oldest is not None and (found := capability(device)) < oldest:
        reasons.append(f"needs compute capability {oldest[0]}.{oldest[1]} or later, {device} has {found[0]}.{found[1]}")
    return reasons


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def select(op: str, device: torch.device, dtype: torch.dtype, vocabulary: int = 0) -> ModuleType:
    """The module that serves `op` for tensors of this device and dtype; of a row op also for rows of this width.

    Raises RuntimeError naming every backend with its reasons where none, or not the forced one, can.
    """
    if not has_float64(device.type):
        raise RuntimeError(
            f"{op}: {device} has no float64, in which the reference backend computes, and no other backend serves it. Move the "
            "tensors to the CPU: .cpu()."
        )
    candidates = ORDER.get(device.type, DEFAULT_ORDER)
    if device.type == "cuda" and measured.MEASURED and measured.cuda_wins(op, dtype, vocabulary, capability(device)):
        candidates = ("cuda", *candidates)
    if _forced:
        forced = _forced[-1]
        backend = BACKENDS[forced]
        of_rows = op in ROW_OPS | SHARD_OPS
        if of_rows or (op in backend.ops and (op not in backend.dtypes_of or backend.takes(op, dtype))):
            candidates = (forced,)
    for name in candidates:
        if not objections(name, op, device, dtype):
            if name == "reference" and not _forced and op in ROW_OPS | SHARD_OPS and dtype != torch.float64:
                _warn_slow(op, device.type)
            return _load(name, op)
    lines = [f"{op}: no backend can serve {dtype} tensors on {device} (asked for: {', '.join(candidates)})."]
    for name in BACKENDS:
        reasons = objections(name, op, device, dtype)
        lines.append(f"  {name}: {'; '.join(reasons) or 'can serve it'}")
    raise RuntimeError("\n".join(lines))


@cache
def _load(name: str, op: str) -> ModuleType:
    return importlib.import_module(f"vcpo_kernels.backends.{BACKENDS[name].package or name}.{op}")


@cache
def _warn_slow(op: str, device_type: str) -> None:
    fast = ORDER.get(device_type, DEFAULT_ORDER)[0]
    if fast == "reference":
        return
    reasons = objections(fast, op, torch.device(device_type), torch.float32)
    warnings.warn(
        f"vcpo_kernels: {op} runs on the slow reference backend, because {fast}: {'; '.join(reasons)}. "
        "`python -m vcpo_kernels.env` shows every backend.",
        UserWarning,
        stacklevel=2,
    )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the context by one backend: "reference", "native", "triton" or "cuda".

    Forward and backward each use the backend in force when they run, so keep `loss.backward()` inside to force both.
    What the backend cannot serve raises RuntimeError with every backend's reasons; only ops other than row ops that it
    does not have at all ("cuda" has none), or not in that dtype, go to the default one. Not thread-safe: it is meant for
    tests and comparisons.

    Raises ValueError for an unknown name.

    >>> import torch, vcpo_kernels as vk
    >>> with vk.use_backend("reference"):
    ...     stats = vk.token_stats(torch.zeros(2, 4), torch.tensor([1, 3]))
    >>> stats.entropy
    tensor([1.3863, 1.3863])
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
