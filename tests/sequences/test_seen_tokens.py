"""Statistics and segments speak of the same tokens: the mask and the shift of the one are known to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels import objectives

V = 9
CU = torch.tensor([0, 4, 7, 13])
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4]])
PROMPT = torch.tensor([1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)

USES: dict[str, Callable[[vk.TokenStats, vk.Segments], Any]] = {
    "vcpo_loss": lambda s, seg: vk.vcpo_loss(s, s.logp.detach() - 0.1, torch.rand(3), 3, seg),
    "sequence_log_weights": lambda s, seg: vk.sequence_log_weights(s, s.logp.detach() - 0.1, seg),
    "reinforce": lambda s, seg: objectives.reinforce(s, s.logp.detach() - 0.1, torch.rand(3), seg),
    "optimal_token_advantages": lambda s, seg: objectives.optimal_token_advantages(torch.rand(3), 3, s, seg),
}


def segments(kind: str, mask: Tensor | None) -> vk.Segments:
    if kind == "packed":
        return vk.Segments.packed(CU, mask)
    owners = torch.repeat_interleave(torch.arange(3), CU.diff())[None]
    return vk.Segments.indexed(owners, 3, None if mask is None else mask[None])


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("kind", ("packed", "indexed"))
@pytest.mark.parametrize("use", USES)
def test_counting_a_masked_token_is_an_error(use: str, kind: str) -> None:
    """Its logp is 0, a probability of 1: weights of e^48, and an ESS that looks healthy."""
    stats = vk.token_stats(torch.randn(1, 13, V), IDS, ~PROMPT[None])
    message = rf"{use}: segments count 5 tokens that were masked when stats were taken.*packed\(cu_seqlens, mask=mask\)"
    for mask in (None, torch.ones(13, dtype=torch.bool)):
        with pytest.raises(ValueError, match=message):
            USES[use](stats, segments(kind, mask))


@pytest.mark.cpu_only("checks read values only on a CPU")
def test_padded_too() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    stats = vk.token_stats(torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.long), mask)
    with pytest.raises(ValueError, match="segments count 2 tokens"):
        vk.vcpo_loss(stats, stats.logp - 0.1, torch.rand(2), 2, vk.Segments.padded(torch.ones(2, 3)))


@pytest.mark.parametrize("use", USES)
def test_the_same_mask_or_a_narrower_one_is_fine(use: str) -> None:
    stats = vk.token_stats(torch.randn(1, 13, V), IDS, ~PROMPT[None])
    narrower = ~PROMPT & (torch.arange(13) != 5)
    for mask in (~PROMPT, (~PROMPT).float(), narrower):
        for kind in ("packed", "indexed"):
            USES[use](stats, segments(kind, mask))


def test_where_nothing_is_read_the_masked_are_left_out_and_counted() -> None:
    """As on a GPU: the numbers are those of the narrower mask, and a metric says how many there were."""
    stats = vk.token_stats(torch.randn(1, 13, V), IDS, ~PROMPT[None])
    wide, narrow = segments("packed", None), segments("packed", ~PROMPT)
    assert int(wide.unseen_tokens(stats)) == 5  # type: ignore[arg-type]
    assert torch.equal(wide.seen_by(stats).lengths, narrow.lengths)
    assert torch.equal(wide.seen_by(stats).sum(stats.logp), narrow.sum(stats.logp))
    mask = ~PROMPT
    shared = vk.Segments.packed(CU, mask)
    assert (
        shared.unseen_tokens(vk.token_stats(torch.randn(13, V), IDS[0], mask)) is None
    )  # one mask: nothing to compare


def one_at_a_time(logits: Tensor) -> Tensor:
    """logp of each sequence by itself, summed over its predicted tokens."""
    sums = []
    for a, b in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        logp = torch.log_softmax(logits[0, a : b - 1].double(), -1)
        sums.append(logp.gather(1, IDS[0, a + 1 : b, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("mask", ("none", "all", "first left out"))
@pytest.mark.parametrize("kind", ("packed", "indexed"))
def test_sums_of_shifted_statistics_end_at_their_sequence(kind: str, mask: str) -> None:
    """A sequence's first token was predicted from its neighbour's last, in whatever way its segments are told."""
    if kind == "indexed" and mask != "first left out":
        pytest.skip(
            "what precedes an indexed token is not for the segments to know (a shared prefix): its mask says it"
        )
    logits = torch.randn(1, 13, V)
    first_out = torch.ones(13, dtype=torch.bool)
    first_out[CU[:-1]] = False
    seg = segments(kind, {"none": None, "all": torch.ones(13, dtype=torch.bool), "first left out": first_out}[mask])
    stats = vk.token_stats(logits, IDS, shift=True)
    want = one_at_a_time(logits)
    predicted = CU.diff() - 1
    for got in (seg.sum(stats.logp), seg.seen_by(stats).sum(stats.logp * 1)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        vk.sequence_log_weights(stats.logp, 0 * stats.logp, seg).double(), want, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(seg.mean(stats.logp).double(), want / predicted, rtol=1e-5, atol=1e-6)
    assert seg.seen_by(stats).lengths.tolist() == predicted.tolist()
    assert seg.seen_by(stats).spread(torch.ones(3), like=stats.logp).sum() == predicted.sum()


def test_means_of_shifted_padded_rows_divide_by_what_was_predicted() -> None:
    stats = vk.token_stats(torch.randn(2, 5, V), torch.randint(0, V, (2, 5)), shift=True)
    seg = vk.Segments.padded(torch.ones(2, 5))
    torch.testing.assert_close(seg.mean(stats.logp), stats.logp[:, 1:].mean(1))
    torch.testing.assert_close(seg.mean(stats.entropy), stats.entropy[:, 1:].mean(1))
    assert seg.lengths.tolist() == [5, 5]  # of the segments alone
    unshifted = vk.token_stats(torch.randn(2, 5, V), torch.randint(0, V, (2, 5)))
    torch.testing.assert_close(seg.mean(unshifted.logp), unshifted.logp.mean(1))


@pytest.mark.parametrize("fused", (False, True))
def test_every_way_to_statistics_remembers(fused: bool) -> None:
    mask = ~PROMPT[None]
    if fused:
        hidden, weight = torch.randn(1, 13, 4), torch.randn(V, 4)
        found = [
            vk.linear_token_stats(hidden, weight, IDS, mask=mask, shift=True),
            vk.linear_weighted_logp(hidden, weight, IDS, torch.ones(1, 13), mask=mask, shift=True)[1],
        ]
    else:
        logits = torch.randn(1, 13, V)
        found = [
            vk.token_stats(logits, IDS, mask, shift=True),
            vk.weighted_logp(logits, IDS, torch.ones(1, 13), mask, shift=True)[1],
        ]
    for stats in found:
        assert torch.equal(stats.mask, mask)  # type: ignore[arg-type]
        torch.testing.assert_close(
            vk.Segments.packed(CU, ~PROMPT).mean(stats.logp),
            found[0].logp.new_tensor(
                [
                    float(stats.logp[0, a:b][torch.arange(b - a).bool() & ~PROMPT[a:b]].mean())
                    for a, b in ((0, 4), (4, 7), (7, 13))
                ]
            ),
        )


# --- groups of one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: vk.vcpo_loss(
            vk.token_stats(torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.long)), torch.zeros(2, 3) - 2,
            torch.rand(2), 1, vk.Segments.padded(torch.ones(2, 3)),
        ),
        lambda: objectives.group_mean_advantages(torch.rand(2), 1),
        lambda: objectives.group_normalized_advantages(torch.rand(2), 1),
        lambda: objectives.leave_one_out_advantages(torch.rand(2), 1),
        lambda: objectives.length_weighted_advantages(torch.rand(2), 1, torch.ones(2)),
        lambda: objectives.opob_advantages(torch.rand(2), 1, torch.zeros(2), torch.ones(2)),
    ],
)  # fmt: skip
def test_an_int_of_one_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"groups=1 makes every sequence its own group.*groups=len\(rewards\)"):
        call()


def test_a_singleton_among_ids_teaches_nothing_and_is_counted() -> None:
    stats = vk.token_stats(torch.randn(4, 3, V), torch.zeros(4, 3, dtype=torch.long))
    seg, rewards = vk.Segments.padded(torch.ones(4, 3)), torch.tensor([1.0, 0.0, 0.7, 0.3])
    out = vk.vcpo_loss(stats, stats.logp - 0.1, rewards, torch.tensor([0, 0, 1, 2]), seg)
    assert out.advantages[2:].tolist() == [0, 0]
    assert out.metrics["single_sequence_groups"] == 2
    assert vk.vcpo_loss(stats, stats.logp - 0.1, rewards, 2, seg).metrics["single_sequence_groups"] == 0
