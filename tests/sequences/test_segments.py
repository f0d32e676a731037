"""Segments: which tokens belong to which sequence. Every layout must give what a Python loop over the
sequences gives.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vcpo_kernels as vk
from tests.sequences.brute_force import LAYOUTS, lay_out

LENGTHS = [3, 0, 1, 5, 2, 0]  # empty sequences inside and at the end, one of a single token


def ragged(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]


# --- sum, mean, lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e300], ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_sum_mean_lengths_match_a_python_loop_whatever_masked_tokens_hold(kind: str, fill: float) -> None:
    """Masked-out tokens contribute exactly nothing: 0 * NaN is what peers' masked sums get wrong."""
    batch, values = lay_out(kind, LENGTHS), ragged(LENGTHS)
    tokens = batch.place(values, fill)
    sums = torch.stack([v.sum() for v in values])
    means = torch.stack([v.sum() / max(len(v), 1) for v in values])
    torch.testing.assert_close(batch.segments.sum(tokens), sums, rtol=1e-14, atol=0)
    torch.testing.assert_close(batch.segments.mean(tokens), means, rtol=1e-14, atol=0)
    assert batch.segments.lengths.tolist() == LENGTHS
    assert batch.segments.num_sequences == len(LENGTHS)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=0, max_size=7), seed=st.integers(0, 2**16))
def test_packed_equals_padded_equals_indexed(lengths: list[int], seed: int) -> None:
    """The layout is bookkeeping: the same sequences give the same bits in each, gradients included."""
    values = ragged(lengths, seed)
    results = []
    for kind in LAYOUTS:
        batch = lay_out(kind, lengths, seed)
        tokens = batch.place(values).requires_grad_()
        per_sequence = batch.segments.sum(tokens)
        weights = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((per_sequence * weights).sum(), tokens)
        picked = batch.pick(gradient)
        assert gradient.abs().sum() == sum(g.abs().sum() for g in picked)  # nothing outside the mask
        results.append((per_sequence.detach(), batch.segments.lengths, *picked))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # Indexed tokens may come in another order within their sequence, so sums differ in the last bit.
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_indexed_tokens_may_interleave_and_minus_one_is_no_sequence() -> None:
    ids = torch.tensor([2, 0, -1, 2, 1, 0], dtype=torch.int32)
    seg = vk.Segments.indexed(ids, 4)
    assert seg.sum(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])).tolist() == [34.0, 16.0, 9.0, 0.0]
    assert seg.lengths.tolist() == [2.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    "segments",
    [
        vk.Segments.padded(torch.zeros(0, 3)),
        vk.Segments.packed(torch.tensor([0])),
        vk.Segments.indexed(torch.full((4,), -1), 0),
    ],
    ids=["padded", "packed", "indexed"],
)
def test_zero_sequences(segments: vk.Segments) -> None:
    """A rank or micro-batch without sequences is an empty result, not an error."""
    tokens = torch.ones(0, 3) if segments.shape == (0, 3) else torch.ones(4)
    tokens.requires_grad_()
    assert segments.sum(tokens).shape == segments.mean(tokens).shape == segments.lengths.shape == (0,)
    segments.sum(tokens).sum().backward()
    assert tokens.grad is not None
    assert not tokens.grad.any()


@pytest.mark.parametrize(
    ("segments", "tokens"),
    [
        (vk.Segments.padded(torch.zeros(2, 0)), torch.ones(2, 0)),
        (vk.Segments.packed(torch.tensor([0, 0, 0])), torch.ones(0)),
        (vk.Segments.indexed(torch.zeros(0, dtype=torch.int64), 2), torch.ones(0)),
    ],
    ids=["padded", "packed", "indexed"],
)
def test_zero_tokens(segments: vk.Segments, tokens: torch.Tensor) -> None:
    """Sequences without a single token sum to 0."""
    assert segments.sum(tokens).tolist() == [0.0, 0.0]
    assert segments.mean(tokens).tolist() == [0.0, 0.0]
    assert segments.lengths.tolist() == [0.0, 0.0]


def test_one_token() -> None:
    for seg in (
        vk.Segments.padded(torch.ones(1, 1)),
        vk.Segments.packed(torch.tensor([0, 1])),
        vk.Segments.indexed(torch.tensor([0]), 1),
    ):
        assert seg.sum(torch.tensor([[2.5]])).tolist() == [2.5]


@pytest.mark.parametrize("kind", ["packed", "packed_masked", "indexed"])
def test_flat_tokens_come_as_n_or_as_one_row_of_n(kind: str) -> None:
    """Packed models emit [1, N]; flash-attention style code holds [N]. Both are the same tokens."""
    batch = lay_out(kind, [2, 3])
    row = batch.place(ragged([2, 3])).reshape(1, -1)
    assert torch.equal(batch.segments.sum(row), batch.segments.sum(row[0]))


def test_one_padded_sequence_takes_its_tokens_flat() -> None:
    """prime-rl calls a loss once per sequence, with 1-D tensors."""
    seg = vk.Segments.padded(torch.tensor([[1, 1, 0]]))
    assert seg.sum(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0]


def test_packed_tokens_past_the_last_sequence_belong_to_none() -> None:
    """Rows padded to a multiple: the rest must neither be counted nor get a gradient."""
    seg = vk.Segments.packed(torch.tensor([0, 1, 3], dtype=torch.int32))
    tokens = torch.tensor([1.0, 2.0, 4.0, math.nan, math.nan], requires_grad=True)
    total = seg.sum(tokens)
    assert total.tolist() == [1.0, 6.0]
    total.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_non_contiguous_tokens() -> None:
    """Strides are honoured (TransformerEngine#2734: a transposed input was silently wrong)."""
    tokens = torch.arange(6.0).reshape(3, 2).t()
    assert vk.Segments.padded(torch.ones(2, 3)).sum(tokens).tolist() == [6.0, 9.0]
    strided = torch.arange(8.0)[::2]
    assert vk.Segments.packed(torch.tensor([0, 1, 4])).sum(strided).tolist() == [0.0, 12.0]
    transposed_mask = torch.tensor([[1, 0], [1, 1]]).t()
    assert vk.Segments.padded(transposed_mask).sum(torch.ones(2, 2)).tolist() == [2.0, 1.0]


def test_gradient_through_an_expanded_upstream() -> None:
    """ROCm/TE#623: a stride-0 grad_output (from .sum()) must be read with its strides."""
    seg = vk.Segments.padded(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    tokens = torch.ones(2, 3, requires_grad=True)
    seg.sum(tokens).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


# --- precision and derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_128k_tokens_lose_nothing(kind: str) -> None:
    """float32 values of mixed size, summed to the nearest float32: a float32 accumulator would be off by
    ~1e-3 here.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    n = 128 * 1024
    values = torch.randn(n, generator=generator) * torch.logspace(-6, 4, n)
    values = torch.cat([values, -values.flip(0)[1:], torch.full((n,), 1e-3)])  # the large ones cancel
    batch = lay_out(kind, [values.numel(), 1])
    exact = math.fsum(values.double().tolist())
    total = batch.segments.sum(batch.place([values, torch.ones(1)]))
    assert total.dtype == torch.float32
    assert abs(float(total[0]) - exact) <= abs(exact) * 2**-23
    assert batch.segments.lengths.tolist() == [values.numel(), 1]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradients_match_finite_differences(kind: str, reduce: str) -> None:
    batch = lay_out(kind, LENGTHS)
    tokens = batch.place(ragged(LENGTHS), fill=0.5).requires_grad_()
    function = getattr(batch.segments, reduce)
    assert torch.autograd.gradcheck(function, tokens)
    assert torch.autograd.gradgradcheck(function, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sum_keeps_the_dtype(dtype: torch.dtype) -> None:
    seg = vk.Segments.padded(torch.ones(1, 300))
    total = seg.sum(torch.ones(1, 300, dtype=dtype))
    assert total.dtype == dtype
    assert total.item() == 300  # bf16 holds 300 but not every partial sum on the way


# --- masks and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float64],
    ids=str,
)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    """Trainers keep masks as bool, long and float; all mean the same."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]]).to(dtype)
    tokens = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert vk.Segments.padded(mask).sum(tokens).tolist() == [3.0, 16.0]
    packed = vk.Segments.packed(torch.tensor([0, 3, 6]), mask.flatten())
    assert packed.sum(tokens.flatten()).tolist() == [3.0, 16.0]
    ids = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert vk.Segments.indexed(ids, 2, mask).sum(tokens).tolist() == [3.0, 16.0]


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, math.nan], ids=str)
def test_masks_with_weights_are_refused(value: float) -> None:
    """A weight in a mask would be rounded to 1 silently."""
    mask = torch.tensor([[1.0, value]])
    with pytest.raises(ValueError, match=r"Segments\.padded: mask must hold only 0 and 1.*\(mask > 0\)"):
        vk.Segments.padded(mask)
    with pytest.raises(ValueError, match=r"Segments\.packed: mask must hold only 0 and 1"):
        vk.Segments.packed(torch.tensor([0, 2]), mask)
    with pytest.raises(ValueError, match=r"Segments\.indexed: mask must hold only 0 and 1"):
        vk.Segments.indexed(torch.tensor([[0, 0]]), 1, mask)


MASK_23 = torch.ones(2, 3)
BAD_INPUT = {
    "padded list": (
        lambda: vk.Segments.padded([[1, 1]]),
        TypeError,
        r"mask must be a torch\.Tensor, got \[\[1, 1\]\]",
    ),
    "padded flat": (
        lambda: vk.Segments.padded(torch.ones(3)),
        ValueError,
        r"mask must be \[B, T\].*Segments\.packed",
    ),
    "padded complex": (
        lambda: vk.Segments.padded(torch.ones(1, 1) * 1j),
        TypeError,
        "bool, integer or 0/1 float",
    ),
    "packed list": (
        lambda: vk.Segments.packed([0, 2]),
        TypeError,
        r"cu_seqlens must be a torch\.Tensor.*torch\.as_tensor",
    ),
    "packed float": (
        lambda: vk.Segments.packed(torch.tensor([0.0, 2.0])),
        TypeError,
        "cu_seqlens must be one of int64, int32",
    ),
    "packed empty": (
        lambda: vk.Segments.packed(torch.tensor([], dtype=torch.int64)),
        ValueError,
        r"must be \[B \+ 1\]",
    ),
    "packed 2-d": (lambda: vk.Segments.packed(torch.tensor([[0, 1]])), ValueError, r"must be \[B \+ 1\]"),
    "packed lengths": (
        lambda: vk.Segments.packed(torch.tensor([3, 4])),
        ValueError,
        r"ascend from 0, got \[3, 4\].*lengths\.cumsum",
    ),
    "packed descends": (lambda: vk.Segments.packed(torch.tensor([0, 4, 2])), ValueError, "ascend from 0"),
    "packed short mask": (
        lambda: vk.Segments.packed(torch.tensor([0, 4]), torch.ones(3)),
        ValueError,
        "cu_seqlens ends at 4 but mask has only 3",
    ),
    "packed 2-d mask": (
        lambda: vk.Segments.packed(torch.tensor([0, 6]), MASK_23),
        ValueError,
        r"mask must be \[N\] or \[1, N\].*\(2, 3\).*Segments\.padded",
    ),
    "packed device": (
        lambda: vk.Segments.packed(torch.tensor([0, 3]), torch.ones(3, dtype=torch.bool, device="meta")),
        ValueError,
        "mask is on meta but cu_seqlens is on cpu",
    ),
    "indexed list": (
        lambda: vk.Segments.indexed([0, 1], 2),
        TypeError,
        r"segment_id must be a torch\.Tensor",
    ),
    "indexed float": (
        lambda: vk.Segments.indexed(torch.tensor([0.0]), 1),
        TypeError,
        "segment_id must be one of int64",
    ),
    "indexed too large": (
        lambda: vk.Segments.indexed(torch.tensor([0, 2]), 2),
        ValueError,
        r"segment_id must lie in \[-1, 2\), got values from 0 to 2.*Raise num_sequences",
    ),
    "indexed below -1": (lambda: vk.Segments.indexed(torch.tensor([-2]), 2), ValueError, r"\[-1, 2\)"),
    "indexed count": (
        lambda: vk.Segments.indexed(torch.tensor([0]), 1.0),
        TypeError,
        "num_sequences must be an int >= 0, got 1.0",
    ),
    "indexed count bool": (lambda: vk.Segments.indexed(torch.tensor([0]), True), TypeError, "got True"),
    "indexed count negative": (
        lambda: vk.Segments.indexed(torch.tensor([-1]), -1),
        ValueError,
        "num_sequences must be an int >= 0, got -1",
    ),
    "indexed count tensor": (
        lambda: vk.Segments.indexed(torch.tensor([0]), torch.tensor(1)),
        TypeError,
        r"int\(num_sequences\)",
    ),
    "indexed mask shape": (
        lambda: vk.Segments.indexed(torch.zeros(3, dtype=torch.int64), 1, torch.ones(2)),
        ValueError,
        r"mask must have shape \(3,\) \(segment_id\.shape\)",
    ),
    "indexed device": (
        lambda: vk.Segments.indexed(torch.tensor([0]), 1, torch.ones(1, dtype=torch.bool, device="meta")),
        ValueError,
        "mask is on meta but segment_id is on cpu",
    ),
    "sum list": (
        lambda: vk.Segments.padded(MASK_23).sum([1.0]),
        TypeError,
        r"Segments\.sum: values must be a torch\.Tensor",
    ),
    "sum integers": (
        lambda: vk.Segments.padded(MASK_23).sum(torch.ones(2, 3, dtype=torch.int64)),
        TypeError,
        r"values must be one of .*float32.*got a int64 tensor.*values\.float\(\)",
    ),
    "sum transposed": (
        lambda: vk.Segments.padded(MASK_23).sum(torch.ones(3, 2)),
        ValueError,
        r"segments' shape \(2, 3\)",
    ),
    "sum flat padded": (
        lambda: vk.Segments.padded(MASK_23).sum(torch.ones(6)),
        ValueError,
        r"segments' shape \(2, 3\)",
    ),
    "sum too few": (
        lambda: vk.Segments.packed(torch.tensor([0, 4])).sum(torch.ones(3)),
        ValueError,
        "values must hold the 4 tokens that cu_seqlens spans",
    ),
    "sum device": (
        lambda: vk.Segments.padded(MASK_23).sum(torch.ones(2, 3, device="meta")),
        ValueError,
        r"values is on meta but segments is on cpu",
    ),
}


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case: str) -> None:
    """Each error names the function and the argument, what it got and what it wants."""
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("Segments.")


def test_numpy_integers_count_as_ints() -> None:
    np = pytest.importorskip("numpy")
    assert vk.Segments.indexed(torch.tensor([0, 1]), np.int64(2)).num_sequences == 2


# --- the shifted token --------------------------------------------------------------------------------------


def test_mask_without_first_takes_out_what_shift_cannot_predict() -> None:
    """Per sequence in padded and packed rows, per row of indexed ones. An empty sequence must not take a
    neighbour's token.
    """
    padded = vk.Segments.padded(torch.tensor([[1, 1], [0, 1]])).mask_without_first(4)
    assert padded is not None
    assert padded.tolist() == [False, True, False, True]
    packed = vk.Segments.packed(torch.tensor([0, 2, 2, 5, 5])).mask_without_first(5)
    assert packed is not None
    assert packed.tolist() == [False, True, False, True, True]
    indexed = vk.Segments.indexed(torch.tensor([[0, 1, 0], [1, 1, -1]]), 2).mask_without_first(6)
    assert indexed is not None
    assert indexed.tolist() == [False, True, True, False, True, True]
