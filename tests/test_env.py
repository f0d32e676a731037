"""python -m vcpo_kernels.env: complete, and never the thing that crashes."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from vcpo_kernels import env
from vcpo_kernels.core import registry


def test_report_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    env.main()
    text = capsys.readouterr().out
    for expected in ("vcpo_kernels", "torch", "triton", "instruction set", "native on cpu", "triton on cuda"):
        assert expected in text
    assert "available (default)" in text


def test_a_broken_probe_becomes_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    lines = dict(env.report())
    assert lines["cuda devices"] == "unknown (RuntimeError: driver too old)"
    assert lines["backends"] == "unknown (RuntimeError: driver too old)"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """No talk of its interpreter where it is not installed, but of what that means on this machine."""

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry.triton_problem.cache_clear()
    try:
        lines = dict(env.report())
    finally:
        registry.triton_problem.cache_clear()
    assert lines["triton"].startswith("not installed: ")
    assert ("left to the other backends" if torch.cuda.is_available() else "nothing is lost here") in lines["triton"]
    assert "triton does not import (ModuleNotFoundError" in lines["triton on cpu"]
    assert not [value for value in lines.values() if "TRITON_INTERPRET" in value]
