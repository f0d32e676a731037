"""What the compiled extension is told: addresses and sizes of tensors, and the place that its kernels run at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.rows.statistics import RowStatistics

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype in csrc/common/dtypes.h


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def rows_argument(rows: Tensor) -> _native.Rows:
    outer, inner, vocabulary = rows.shape
    return _native.Rows(
        rows.data_ptr(), DTYPE_CODES[rows.dtype], outer, inner, vocabulary, rows.stride(0), rows.stride(1)
    )


def output_argument(out: Tensor) -> _native.Output:
    return _native.Output(out.data_ptr(), out.stride(0), out.stride(1))


def tokens_argument(token_ids: Tensor, mask: Tensor | None, shift: bool) -> _native.Tokens:
    return _native.Tokens(token_ids.data_ptr(), address(mask), shift)


def scaling_argument(temperature: float, softcap: float | None) -> _native.Scaling:
    return _native.Scaling(temperature, softcap or 0.0)


def statistics_argument(statistics: RowStatistics) -> _native.Statistics:
    """Each by its name: a field that the extension does not have is an error, not another field's memory."""
    return _native.Statistics(**{name: value.data_ptr() for name, value in statistics._asdict().items()})


@contextlib.contextmanager
def segments_argument(
    mask: Tensor | None, offsets: Tensor, order: Tensor | None, num_tokens: int
) -> Iterator[_native.Segments]:
    """A Segments' tensors, which are kept for as long as the extension reads them."""
    held = [t if t is None else t.contiguous() for t in (mask, offsets, order)]
    at = [address(t) for t in held]
    yield _native.Segments(at[0], at[1], at[2], offsets.shape[0] - 1, num_tokens)


@contextlib.contextmanager
def place_of(rows: Tensor) -> Iterator[_native.Place]:
    """PyTorch's threads; or the device of `rows`, current meanwhile, and the stream that PyTorch is using there."""
    if not rows.is_cuda:
        yield _native.Place.cpu(torch.get_num_threads())
        return
    with torch.cuda.device(rows.device):
        stream = torch.cuda.current_stream(rows.device)
        yield _native.Place.cuda(stream.device_index, stream.cuda_stream)
