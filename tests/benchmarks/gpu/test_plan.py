"""The plan fits its time and names tests that exist."""

from __future__ import annotations

from benchmarks.gpu import phases
from benchmarks.gpu.plan import GPU, TOTAL_SECONDS


def test_gpu_plan_fits_nine_minutes() -> None:
    assert sum(p.seconds for p in GPU.phases) <= TOTAL_SECONDS <= 9 * 60
    assert GPU.headline not in GPU.shapes
    assert len({*GPU.shapes, GPU.headline}) == 5 * 5 * 2
    missing = [t for t in GPU.tests if not (phases.ROOT / t).exists()]
    assert not missing
