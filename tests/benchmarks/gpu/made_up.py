"""Result rows that no run gave."""

from __future__ import annotations

from benchmarks.gpu.plan import GPU


def headline_row(work: str, name: str, **fields: object) -> dict[str, object]:
    """A timed row at the headline's shape."""
    shape = GPU.headline.fields()
    return {"kind": "time", "work": work, "name": name, "device": "cuda", "spread": 0.0, **shape, **fields}
