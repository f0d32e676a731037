"""Row kernels on a GPU: widths and sizes that a CPU's tests are too slow for, repeatability, aliasing, views, bad ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases import rows as row_cases
from benchmarks.cases.case import Case
from benchmarks.cases.shapes import Shape
from tests.rows import row_inputs
from tests.rows.row_checks import FIELDS, assert_gradient, assert_statistics, oracle, run

# One CTA, one short of and one past a 16-byte access, a cluster's width and more, and a width that no vector divides.
WIDTHS = (8, 1023, 32000, 49152, 65537, 128256, 151936, 151937, 262144)


@pytest.mark.parametrize("vocabulary", WIDTHS)
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("normal", "peaked", "rising", "masked_vocabulary"))
def test_matches_float64(backend: str, device: torch.device, kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    if device.type == "cpu" and vocabulary > 32000:
        pytest.skip("too slow for a dry run")
    with torch.device("cpu"):
        logits, ids = row_inputs.make(kind, 3, vocabulary, dtype)
    logits, ids = logits.to(device), ids.to(device)
    g, h = torch.randn(3, device=device), torch.randn(3, device=device)
    stats, grad = run(logits, ids, g, h, temperature=0.9)
    want, want_grad = oracle(logits, ids, g, h, temperature=0.9)
    assert_statistics(stats, want)
    assert_gradient(grad, want_grad, g.abs() + h.abs() * (1 + want.entropy), want)


@pytest.mark.parametrize("vocabulary", (33, 32000, 151936))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_score_rows_in_place_is_out_of_place(
    backend: str, device: torch.device, dtype: torch.dtype, vocabulary: int
) -> None:
    """What is written over a row must be read before: the same scores to the bit, and those of float64."""
    rows = 5 if device.type == "cuda" else 2
    with torch.device("cpu"):
        logits, ids = row_inputs.make("outliers", rows, vocabulary, dtype)
    logits, ids, c = logits.to(device), ids.to(device), torch.randn(rows, device=device)
    want, want_grad = oracle(logits, ids, c, torch.zeros_like(c))
    leaf = logits.clone().requires_grad_()
    (apart,) = torch.autograd.grad(vk.weighted_logp(leaf, ids, c)[0], leaf)
    leaf = logits.clone().requires_grad_()
    (over,) = torch.autograd.grad(vk.weighted_logp(row_cases.computed(leaf), ids, c, inplace=True)[0], leaf)
    assert torch.equal(apart, over)
    assert_gradient(apart, want_grad, c.abs(), want)


def test_backward_in_place_is_out_of_place(backend: str, device: torch.device) -> None:
    x = row_cases.make_inputs_in_parts(Shape(6, 40001, "bfloat16"), device)
    apart = row_cases.ours_backward(x)
    assert torch.equal(apart, row_cases.ours_inplace(x))
    assert torch.equal(apart, x.logits)


@pytest.mark.parametrize("work", row_cases.CASES, ids=lambda c: c.work)
def test_repeats_to_the_bit(backend: str, device: torch.device, work: Case[row_cases.RowInputs]) -> None:
    """The same bits again, and for a row alone the bits it has in its batch (but for eager torch, which splits sums)."""
    rows = 300 if device.type == "cuda" else 4
    x = row_cases.make_inputs_in_parts(Shape(rows, 5000, "bfloat16"), device)

    def results(part: slice) -> tuple[Tensor, ...]:
        some = type(x)(x.logits[part].clone(), x.token_ids[part], x.g[part])
        got = work.run(some)
        return got if isinstance(got, tuple) else (got,)

    first, again, alone = results(slice(None)), results(slice(None)), results(slice(2, 3))
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert backend == "reference" or torch.equal(a[2:3], c)


@pytest.mark.parametrize("name", ("all but the last token", "every second row", "part of the vocabulary"))
def test_views(backend: str, device: torch.device, name: str) -> None:
    """Strided and sliced logits, some with rows that start off 16 bytes, give what their copies give."""
    base = torch.randn(3, 8, 4100, device=device).bfloat16()
    logits = {
        "all but the last token": base[:, :-1],
        "every second row": base[:, ::2],
        "part of the vocabulary": base[..., 3:4098],
    }[name]
    ids = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=device)
    g = torch.randn(ids.numel(), device=device)
    stats, grad = run(logits, ids, g, g)
    copied, copied_grad = run(logits.contiguous(), ids, g, g)
    for field in FIELDS:
        torch.testing.assert_close(getattr(stats, field), getattr(copied, field), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad, copied_grad)


def test_more_than_two_to_the_31_elements(backend: str, cuda: torch.device) -> None:
    """Offsets that need 64 bits: the last rows of 4.6 GB are right, and the gradient lands where they are."""
    if backend == "reference":
        pytest.skip("eager torch needs ten times the memory")
    shape = Shape(2**31 // 151936 + 64, 151936, "bfloat16")
    if torch.cuda.mem_get_info()[0] < 3 * shape.bytes + 2**31:
        pytest.skip(f"needs {3 * shape.bytes / 2**30:.0f} GiB of free memory")
    x = row_cases.make_inputs_in_parts(shape, cuda)
    exact = row_cases.oracle(x, most=16)  # of rows up to the last
    for case in row_cases.GRID:
        assert case.error(case.run(x), exact) <= row_cases.error_bound(case, backend, x.logits.dtype), case.work


def test_bad_ids_show_and_are_counted(backend: str, cuda: torch.device) -> None:
    """A GPU is not waited for, so an id outside the vocabulary is no error: its logp is NaN, its sequence dropped."""
    logits = torch.randn(4, 2, 64, device=cuda, requires_grad=True)
    ids = torch.randint(0, 64, (4, 2), device=cuda)
    ids[1, 0], ids[2, 1] = 64, -7
    stats = vk.token_stats(logits, ids)
    bad = torch.zeros(4, 2, dtype=torch.bool, device=cuda)
    bad[1, 0] = bad[2, 1] = True
    assert torch.equal(stats.logp.isnan(), bad)
    segments = vk.Segments.padded(torch.ones(4, 2, device=cuda))
    mu = torch.full((4, 2), -4.0, device=cuda)
    out = vk.vcpo_loss(stats, mu, torch.tensor([1.0, 0.0, 1.0, 0.5], device=cuda), 4, segments)
    assert out.metrics["nonfinite_sequences"].item() == 2
    out.loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
