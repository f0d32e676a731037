"""The one type of a case, for every benchmark and device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Inputs = TypeVar("Inputs")
OURS = "vcpo_kernels"


@dataclass(frozen=True)
class Case(Generic[Inputs]):
    """One way to do one kind of work.

    name: whose way. work: what is done, as result rows say it. run: what is timed. error: of what `run` gave, against the
    float64 result of the same inputs. needs: the module that it is made of. op: what the registry calls our kernel.

    What the work cannot do without, which says nothing of what the case does: floor_nv passes over NV logits, or `gemms`
    GEMMs of size N V H. buffers: passes of NV that must fit into memory at once.

    inplace: it writes over its inputs. masked: it takes inputs of which half are left out. against: the case whose time
    its own is held against. gpu_only: on a CPU it would be another piece of code.
    """

    name: str
    work: str
    run: Callable[[Inputs], Any]
    error: Callable[[Any, Any], float]
    needs: str = OURS
    op: str = ""
    floor_nv: int = 0
    gemms: int = 0
    buffers: int = 2
    inplace: bool = False
    masked: bool = False
    against: str = ""
    gpu_only: bool = False

    @property
    def ours(self) -> bool:
        return self.needs == OURS

    def missing(self, device: torch.device) -> str:
        """Why it cannot run here, or nothing."""
        try:
            importlib.import_module(self.needs)
        except Exception as error:  # a package for another torch, or without a device, raises anything
            return f"{type(error).__name__}: {error}"[:200]
        return "its kernel needs a GPU" if self.gpu_only and device.type == "cpu" else ""
