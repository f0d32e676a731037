"""How far a result is from float64. Nothing that is too far is timed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Of the whole tensor, in the L2 norm."""
    return float((got.double() - want).norm() / want.norm())


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Of any entry of any tensor: |error| / (1 + |value|)."""
    return max(float(((a.double() - b).abs() / (1 + b.abs())).max()) for a, b in zip(got, want, strict=True))


def require(what: str, error: float, bound: float) -> None:
    """Ends the command where an error is over its bound, or not a number."""
    if not error <= bound:
        raise SystemExit(f"{what}: error {error:.2e} over the bound {bound}")
