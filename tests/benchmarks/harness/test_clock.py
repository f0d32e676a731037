"""What is said of times."""

from __future__ import annotations

from benchmarks.harness.clock import Times


def test_spread_is_between_the_passes() -> None:
    times = Times(([1.0, 2.0, 3.0], [1.0, 1.0, 9.0]))
    assert (times.first_ms, times.second_ms, times.spread, times.repeats) == (2.0, 1.0, 1.0, 6)
