"""python -m vcpo_kernels.env: complete, and never the thing that crashes."""

from __future__ import annotations

import pytest
import torch

from vcpo_kernels import env


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
