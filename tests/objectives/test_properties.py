"""What holds for every objective: the gradient is -coefficients, layouts agree, micro-batches add up, and what a token
outside the mask or a broken token holds reaches nothing else.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests.objectives import ragged
from tests.sequences.brute_force import LAYOUTS
from vcpo_kernels import objectives
from vcpo_kernels.core import registry
from vcpo_kernels.objectives import OBJECTIVES
from vcpo_kernels.rows.token_loss import token_loss

NAMES = sorted(OBJECTIVES)
NAN, INF = math.nan, math.inf
WITH_PROXIMAL = [n for n in NAMES if "proximal_logp" in OBJECTIVES[n].value.proximal_terms]


def stats_of(logp: Tensor, entropy: Tensor | None = None, shifted: bool = False) -> vk.TokenStats:
    """Statistics with chosen logp (and entropy), as leaves."""
    entropy = torch.ones_like(logp) if entropy is None else entropy
    return vk.TokenStats(logp, entropy, torch.ones_like(logp), torch.zeros_like(logp), shifted)


def everything(batch: ragged.Batch) -> dict[str, object]:
    return {
        "reference_logp": batch.reference,
        "kl_coefficient": 0.1,
        "entropy_coefficient": 0.05,
        "max_tokens": 8.0,
    }


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), spread=st.sampled_from([0.0, 0.05, 1.0, 6.0]), scale=st.sampled_from([1.0, -3.0]))
def test_gradient_is_minus_the_coefficients(name: str, seed: int, spread: float, scale: float) -> None:
    batch = ragged.make("packed_masked", spread=spread, seed=seed)
    logp = batch.stats().logp.detach().requires_grad_()
    entropy = torch.rand(logp.shape, dtype=torch.float64).requires_grad_()
    out = OBJECTIVES[name](stats_of(logp, entropy), batch.mu, batch.advantages, batch.segments, **everything(batch))
    to_logp, to_entropy = torch.autograd.grad(scale * out.loss, [logp, entropy])
    assert torch.equal(to_logp, -scale * out.coefficients)
    assert out.entropy_coefficients is not None
    assert torch.equal(to_entropy, -scale * out.entropy_coefficients)
    assert out.coefficients.isfinite().all()
    assert not out.coefficients.requires_grad
    dead = ~torch.isfinite(batch.mu)
    assert not to_logp[dead].any()
    assert not to_entropy[dead].any()


@pytest.mark.parametrize("name", NAMES)
def test_layouts_agree(name: str) -> None:
    """The same sequences padded, packed and indexed: the same loss, coefficients, ESS and metrics."""
    results = []
    for kind in LAYOUTS:
        batch = ragged.make(kind)
        out = OBJECTIVES[name](batch.stats(), batch.mu, batch.advantages, batch.segments, **everything(batch))
        results.append((out, torch.cat(batch.layout.pick(out.coefficients))))
    for out, coefficients in results[1:]:
        torch.testing.assert_close(coefficients, results[0][1])
        torch.testing.assert_close(out.loss, results[0][0].loss)
        torch.testing.assert_close(out.log_weights, results[0][0].log_weights)
        torch.testing.assert_close(out.metrics, results[0][0].metrics)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_masked_tokens_contribute_exactly_nothing(name: str, garbage: float) -> None:
    """In every input at once, and the gradient they get is exactly 0."""
    clean, dirty = [], []
    for fill, results in ((-1.0, clean), (garbage, dirty)):
        batch = ragged.make("padded")
        dead = batch.mu.isnan()
        at = {key: torch.where(dead, fill, getattr(batch, key)) for key in ("mu", "proximal", "reference")}
        logp = torch.where(dead, fill, batch.stats().logp.detach()).requires_grad_()
        entropy = torch.where(dead, fill, 1.0).to(logp.dtype).requires_grad_()
        knobs = everything(batch) | {
            "reference_logp": at["reference"],
            "token_weights": torch.where(dead, fill, 0.5).to(logp.dtype),
        }
        if name in WITH_PROXIMAL:
            knobs["proximal_logp"] = at["proximal"]
        out = OBJECTIVES[name](stats_of(logp, entropy), at["mu"], batch.advantages, batch.segments, **knobs)
        results += [out.loss, *torch.autograd.grad(out.loss, [logp, entropy]), *out.metrics.values(), out.log_weights]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name: str) -> None:
    """With the step's num_sequences and num_tokens, losses and gradients of the parts sum to the whole's."""
    batch = ragged.make("padded")
    knobs = everything(batch)
    lengths = batch.segments.lengths

    def part(rows: slice, **more: object) -> objectives.ObjectiveOutput:
        return OBJECTIVES[name](
            vk.token_stats(batch.logits[rows], batch.token_ids[rows]),
            batch.mu[rows],
            batch.advantages[rows],
            vk.Segments.padded(~batch.mu[rows].isnan()),
            **{**knobs, "reference_logp": batch.reference[rows], **more},
        )

    if name == "m2po":
        knobs["threshold"] = 1e3  # the mask belongs to the batch that a call sees; without it, the sum must hold
    whole = part(slice(None))
    counts = {"num_sequences": float((lengths > 0).sum()), "num_tokens": float(lengths.sum())}
    parts = [part(rows, **counts) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([p.coefficients for p in parts]), whole.coefficients)
    torch.testing.assert_close(torch.cat([p.entropy_coefficients for p in parts]), whole.entropy_coefficients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_broken_token_is_dropped_and_counted(name: str, broken: float) -> None:
    """One token's log pi/mu is NaN or infinite: every other sequence is as it was, and nothing becomes NaN."""
    batch = ragged.make("padded")
    row, column = 4, 2
    logp = batch.stats().logp.detach()
    mu = batch.mu.clone()
    mu[row, column] = logp[row, column] - broken  # log ratio = broken
    knobs = {"max_tokens": 8.0} | ({"threshold": 1e3} if name == "m2po" else {})

    def run(behavior: Tensor) -> objectives.ObjectiveOutput:
        return OBJECTIVES[name](stats_of(logp), behavior, batch.advantages, batch.segments, **knobs)

    good, bad = run(batch.mu), run(mu)
    others = torch.arange(6) != row
    assert bad.loss.isfinite()
    assert bad.coefficients.isfinite().all()
    assert all(v.isfinite() for v in bad.metrics.values())
    torch.testing.assert_close(bad.coefficients[others], good.coefficients[others])
    if name in ("reinforce", "rloo"):  # look at no ratio
        assert torch.equal(bad.coefficients, good.coefficients)
    elif broken != -INF:  # -inf is a ratio of 0
        whole = name in (
            "sequence_truncated_is",
            "sequence_masked_is",
            "topr",
            "gspo",
            "gspo_token",
            "gmpo",
            "vespo",
            "opsm",
        )
        length = float(batch.segments.lengths[row])
        assert bad.metrics["nonfinite_tokens"] == (length if whole else 1)
        assert bad.coefficients[row, column] == 0
        assert whole == (not bad.coefficients[row].any())
    if broken != -INF:
        assert bad.ess <= 4  # of 5 sequences: the broken one has no weight, and stays in the ratio's denominator
        assert bad.ess_ratio <= bad.ess / 5 + 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [50.0, 1e3, 3e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_ratios_never_become_nan_or_inf(name: str, distance: float, sign: int) -> None:
    """In fp32, both ways, with both signs of the advantage. Where no bound stops the ratio, tokens are dropped, counted."""
    logp = torch.full((2, 3), -1.0).requires_grad_()
    mu = torch.full((2, 3), -1.0 - sign * distance)
    out = OBJECTIVES[name](stats_of(logp), mu, torch.tensor([1.0, -1.0]), vk.Segments.padded(torch.ones(2, 3)))
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad.isfinite().all()
    assert out.loss.isfinite()
    assert all(v.isfinite() for v in out.metrics.values()), out.metrics
    if sign > 0 and distance > 80 and name in ("ppo", "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gmpo"):
        assert out.metrics["nonfinite_tokens"] == 3  # A < 0 has no upper bound there
    if name in ("token_truncated_is", "cispo", "dppo_tv", "sapo", "vespo", "ppo_dual_clip", "topr"):
        assert out.metrics["nonfinite_tokens"] == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("distance", [50.0, 79.0, 1e3, 3e38, -50.0, -79.0, -1e3, INF, -INF, NAN])
def test_a_far_reference_never_becomes_nan_or_inf(estimator: str, weighted: bool, distance: float) -> None:
    """Its KL term is left out and counted where it overflows; the policy term stays as it is."""
    logp = torch.full((1, 3), -1.0).requires_grad_()
    mu = torch.tensor([[-1.0, -60.0, -1.0]])
    reference = torch.tensor([[-1.0 - distance, -1.0 - distance, -1.1]])
    kl = {"reference_logp": reference, "kl_coefficient": 10.0, "kl_estimator": estimator}
    out = objectives.ppo_clip(
        stats_of(logp), mu, torch.ones(1), vk.Segments.padded(torch.ones(1, 3)), kl_importance_weighted=weighted, **kl
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad.isfinite().all()
    assert out.loss.isfinite()
    assert all(v.isfinite() for v in out.metrics.values())
    if not math.isfinite(distance):
        assert out.metrics["kl_nonfinite_tokens"] == 2
        torch.testing.assert_close(grad[0, 0], torch.tensor(-1 / 3))


@pytest.mark.parametrize("name", NAMES)
def test_huge_advantages_never_become_inf(name: str) -> None:
    """A ratio just below e^80 times a large advantage leaves fp32's range."""
    logp = torch.full((2, 1), -1.0).requires_grad_()
    mu = torch.full((2, 1), -80.9)
    out = OBJECTIVES[name](stats_of(logp), mu, torch.tensor([-1e20, 1e20]), vk.Segments.padded(torch.ones(2, 1)))
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad.isfinite().all()
    assert out.loss.isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_zero_advantages_have_zero_coefficients(name: str) -> None:
    """Whatever the ratio: 0 times an overflow is 0, and is not counted as broken."""
    logp = torch.full((2, 3), -1.0)
    mu = torch.tensor([[-1.0, -1e3, 1e3], [-1e30, -1.0, -1.0]])
    out = OBJECTIVES[name](stats_of(logp), mu, torch.zeros(2), vk.Segments.padded(torch.ones(2, 3)))
    assert not out.coefficients.any()
    assert out.loss == 0
    assert out.metrics["nonfinite_tokens"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches(name: str) -> None:
    """No sequence, no token, no valid token: a loss of 0 that can be backpropagated."""
    for shape, mask in (((0, 4), torch.ones(0, 4)), ((2, 0), torch.ones(2, 0)), ((2, 4), torch.zeros(2, 4))):
        logp = torch.zeros(shape, requires_grad=True)
        out = OBJECTIVES[name](
            stats_of(logp), torch.zeros(shape), torch.ones(shape[0]), vk.Segments.padded(mask), max_tokens=4
        )
        out.loss.backward()
        assert out.loss == 0
        assert not logp.grad.any()
        assert out.ess_ratio == 0


@pytest.mark.parametrize("kind", ["padded", "packed", "indexed"])
def test_shifted_statistics_leave_out_what_has_no_prediction(kind: str) -> None:
    """The first token of a row (of a packed sequence) counts nowhere, though the mask says it does."""
    mask = torch.ones(2, 4)
    segments = {
        "padded": vk.Segments.padded(mask),
        "packed": vk.Segments.packed(torch.tensor([0, 4, 8])),
        "indexed": vk.Segments.indexed(torch.arange(2).repeat_interleave(4).view(2, 4), 2),
    }[kind]
    shape = (8,) if kind == "packed" else (2, 4)
    logp = torch.randn(2, 4)
    logp[:, 0] = NAN
    advantages = torch.tensor([1.0, -1.0])
    shifted = objectives.ppo_clip(
        stats_of(logp.view(shape), shifted=True), torch.full(shape, -1.0), advantages, segments
    )
    short = objectives.ppo_clip(
        stats_of(logp[:, 1:]), torch.full((2, 3), -1.0), advantages, vk.Segments.padded(torch.ones(2, 3))
    )
    torch.testing.assert_close(shifted.coefficients.view(2, 4)[:, 1:], short.coefficients)
    assert not shifted.coefficients.view(2, 4)[:, 0].any()
    assert shifted.metrics["num_tokens"] == 6
    torch.testing.assert_close(shifted.loss, short.loss)


def test_one_advantage_per_sequence_is_that_at_each_token() -> None:
    batch = ragged.make("indexed")
    spread = batch.segments.spread(batch.advantages, like=batch.mu)
    for name in NAMES:
        if name in ("gspo", "gmpo", "topr", "vespo"):
            continue
        a, b = (
            OBJECTIVES[name](batch.stats(), batch.mu, adv, batch.segments, max_tokens=8.0).coefficients
            for adv in (batch.advantages, spread)
        )
        assert torch.equal(a, b), name


def test_coefficients_are_what_weighted_logp_takes() -> None:
    """The two-phase step: statistics without gradient, then the logits once more with known coefficients."""
    batch = ragged.make("padded")
    out = objectives.gspo(batch.stats(), batch.mu, batch.advantages, batch.segments)
    (want,) = torch.autograd.grad(out.loss, batch.logits)
    loss, _ = vk.weighted_logp(batch.logits, batch.token_ids, -out.coefficients)
    (got,) = torch.autograd.grad(loss, batch.logits)
    torch.testing.assert_close(got, want)


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not see into OBJECTIVES[...]")
@pytest.mark.parametrize("name", ["grpo", "gspo", "m2po", "vespo"])
def test_compiles_without_a_graph_break(name: str) -> None:
    batch = ragged.make("padded")
    mu, knobs = (
        batch.mu.float(),
        {"kl_coefficient": 0.1, "reference_logp": batch.reference.float(), "entropy_coefficient": 0.1},
    )

    def loss(logp: Tensor, mu: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = OBJECTIVES[name](stats_of(logp, logp.square()), mu, advantages, vk.Segments.padded(mask), **knobs)
        return out.loss, out.metrics["ess_ratio"]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        logp = batch.stats().logp.detach().float().requires_grad_()
        value, ratio = function(logp, mu, batch.advantages.float(), ~batch.mu.isnan())
        results.append((value, ratio, torch.autograd.grad(value, logp)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted({OBJECTIVES[n].function.__name__ for n in NAMES}))
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not see into OBJECTIVES[...]")
def test_functions_compile_with_hyperparameters_of_the_call(name: str) -> None:
    """Of the values that a call makes, the compiler sees through the making as well."""
    batch = ragged.make("padded")

    def loss(logp: Tensor, mu: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        segments = vk.Segments.padded(mask)
        out = getattr(objectives, name)(
            stats_of(logp, shifted=True), mu, advantages, segments, aggregation="token-mean"
        )
        again = OBJECTIVES[name if name in OBJECTIVES else "dapo"](
            stats_of(logp), mu, advantages, segments, aggregation="seq-mean-token-sum"
        )
        return out.loss + again.loss

    arguments = (batch.stats().logp.detach().float(), batch.mu.float(), batch.advantages.float(), ~batch.mu.isnan())
    torch._dynamo.reset()  # so many compilations of one function would be too many
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_stays_on_the_kernels_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, a float64 segment op would fall back to the reference, which synchronises."""
    asked = set()
    select = registry.select

    def watched(op: str, device: torch.device, dtype: torch.dtype, *rest: int) -> object:
        asked.add((op, dtype))
        return select(op, device, dtype, *rest)

    monkeypatch.setattr(registry, "select", watched)
    batch = ragged.make()
    knobs = everything(batch) | {"reference_logp": batch.reference.float(), "token_weights": torch.ones(6)}
    stats = vk.token_stats(batch.logits.float(), batch.token_ids)
    for logp in (stats.logp, stats.logp.bfloat16()):
        leaf = logp.detach().requires_grad_()
        out = OBJECTIVES[name](stats_of(leaf), batch.mu.float(), batch.advantages.float(), batch.segments, **knobs)
        out.loss.backward()
        assert leaf.grad is not None
    advantages = objectives.optimal_token_advantages(batch.advantages.float(), 6, stats, batch.segments)
    assert advantages.dtype == torch.float32
    assert ("segment_sum", torch.float32) in asked
    assert {dtype for op, dtype in asked if op != "token_stats"} == {torch.float32}


@pytest.mark.parametrize("with_entropy", [True, False])
def test_token_loss_is_a_proper_op(with_entropy: bool) -> None:
    logp, entropy = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    coefficients = torch.randn(5, dtype=torch.float64)
    more = torch.randn(5, dtype=torch.float64) if with_entropy else None
    value = torch.tensor(1.5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.vcpo_kernels.token_loss, (logp, entropy, coefficients, more, value))


def test_an_overflowed_upstream_gradient_stays_out_of_dropped_tokens() -> None:
    logp = torch.zeros(3, requires_grad=True)
    loss = token_loss(logp, torch.zeros(3), torch.tensor([0.0, 1.0, -1.0]), None, torch.tensor(1.0))
    (grad,) = torch.autograd.grad(loss, logp, grad_outputs=torch.tensor(INF))
    assert grad.tolist() == [0.0, -INF, INF]


def test_the_output_is_detached_but_for_the_loss() -> None:
    batch = ragged.make()
    out = objectives.ppo_clip(batch.stats(), batch.mu, batch.advantages, batch.segments, entropy_coefficient=0.1)
    assert out.loss.requires_grad
    for field in dataclasses.fields(out):
        value = getattr(out, field.name)
        if isinstance(value, Tensor) and field.name != "loss":
            assert not value.requires_grad, field.name
    assert not any(v.requires_grad or v.dim() for v in out.metrics.values())
    assert out.coefficients.shape == batch.mu.shape
