"""The inputs every row kernel is tested on. Logits without outliers, peaks and -inf would prove little: the errors that
peers shipped were all in rows like these (see each entry)."""

from __future__ import annotations

import torch
from torch import Tensor

# Not divisible by any vector width, one below and above a block, a small real vocabulary. 151936 has its own slow test.
VOCABULARIES = (1, 7, 33, 4095, 4097, 49152)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _normal(z: Tensor, ids: Tensor) -> None:
    pass


def _outliers(z: Tensor, ids: Tensor) -> None:
    """Spread over 80 units each way, so that almost all exponentials underflow."""
    z.mul_(20)


def _equal(z: Tensor, ids: Tensor) -> None:
    """The largest entropy; sums of V equal terms show accumulation error."""
    z.fill_(3.0)


def _peaked(z: Tensor, ids: Tensor) -> None:
    """p_y from 0.9999 to 1 - 1e-12: where 1 - 2 p_y + sum p^2 cancels to nothing."""
    top = z.amax(-1) + torch.log(torch.tensor(float(z.shape[-1]))) + torch.linspace(9, 28, z.shape[0])
    z.scatter_(-1, ids.unsqueeze(-1), top.unsqueeze(-1))


def _peaked_elsewhere(z: Tensor, ids: Tensor) -> None:
    """All mass on a token that was not sampled: a large negative logp."""
    other = (ids + 1) % z.shape[-1]
    z.scatter_(-1, other.unsqueeze(-1), 60.0)


def _one_hot(z: Tensor, ids: Tensor) -> None:
    """Logits of +-1e4: exp overflows unless the maximum is taken off first; fp32 lse has only 3 decimals left."""
    z.fill_(-1e4)
    z.scatter_(-1, ids.unsqueeze(-1), 1e4)


def _masked_vocabulary(z: Tensor, ids: Tensor) -> None:
    """Half the vocabulary at -inf, as top-k sampling leaves it; first row: everything but the target."""
    hidden = torch.rand(z.shape) < 0.5
    hidden[0] = True
    hidden.scatter_(-1, ids.unsqueeze(-1), False)
    z.masked_fill_(hidden, float("-inf"))


def _all_below(z: Tensor, ids: Tensor) -> None:
    """Every logit below -87: a running maximum that starts at 0 underflows the whole row."""
    z.sub_(300.0)


def _offset(z: Tensor, ids: Tensor) -> None:
    """A large common offset: a 24-bit lse of 1000 is only good to 3e-5, the statistics must be better."""
    z.add_(1000.0)


def _rising(z: Tensor, ids: Tensor) -> None:
    """The maximum moves up all along the row, so that every block finds a new one."""
    z.add_(torch.linspace(-200, 50, z.shape[-1]))


def _late_peak(z: Tensor, ids: Tensor) -> None:
    """A maximum late in the row, 8 to 10 above all before it: entropy cancels if exponents keep the old reference."""
    z[:, -(z.shape[-1] // 4 + 1)] = z.amax(-1) + torch.linspace(8, 10, z.shape[0])


def _filled(z: Tensor, ids: Tensor) -> None:
    """All but one entry at a large finite fill, as constrained decoding masks: u where an ulp is a thousand binades, or out of
    fp32's range. The one is the token, or in every second row is not; row 4 has none.
    """
    for row, fill in enumerate((-1e38, -1e10, -1e20, -1e30, -1e9)[: z.shape[0]]):
        z[row] = fill
        z[row, (ids[row] + row % 2) % z.shape[1]] = 0.5 if row < 4 else fill


KINDS = {
    f.__name__[1:]: f
    for f in (
        _normal,
        _outliers,
        _equal,
        _peaked,
        _peaked_elsewhere,
        _one_hot,
        _masked_vocabulary,
        _all_below,
        _offset,
        _rising,
        _late_peak,
        _filled,
    )
}


def make(kind: str, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [rows, vocabulary] of the given kind and dtype, and token ids [rows]."""
    z = torch.randn(rows, vocabulary)
    ids = torch.randint(0, vocabulary, (rows,))
    KINDS[kind](z, ids)
    lowest = torch.finfo(dtype).min  # what is below it, and finite, stays finite
    return torch.where(z.isfinite(), z.clamp(min=lowest), z).to(dtype), ids
