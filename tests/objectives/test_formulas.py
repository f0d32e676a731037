"""Each objective is its paper's loss: value and gradient, in float64, against autograd of the loss written out sequence by
sequence, in every layout.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.objectives import ragged
from tests.objectives.ragged import CASES, Batch, Case, aggregate
from tests.sequences.brute_force import LAYOUTS
from vcpo_kernels import objectives
from vcpo_kernels.objectives import OBJECTIVES

MAX_TOKENS = 7.0


def gradient(loss: Tensor, batch: Batch) -> Tensor:
    return torch.autograd.grad(loss, batch.logits, retain_graph=True)[0]


def expand(batch: Batch, by_token: bool) -> list[Tensor]:
    if by_token:
        return batch.layout.pick(batch.token_advantages)
    return [a.expand(len(at)) for a, at in zip(batch.advantages, batch.layout.positions, strict=True)]


def aggregation_of(case: Case, **override: str) -> str:
    if "aggregation" in override or "aggregation" in case.knobs:
        return override.get("aggregation") or case.knobs["aggregation"]
    return OBJECTIVES[case.name].value.aggregation


def token_losses(case: Case, batch: Batch) -> list[Tensor]:
    mu = batch.layout.pick(batch.mu)
    proximal = batch.layout.pick(batch.proximal) if case.proximal else mu
    a = expand(batch, case.token_advantages)
    sequences = zip(batch.logp(), mu, proximal, a, strict=True)
    return [case.loss(p, m, q, adv, **case.written) if len(p) else p for p, m, q, adv in sequences]


def run(case: Case, batch: Batch, **more: object) -> objectives.ObjectiveOutput:
    knobs = {**case.knobs, **more}
    if case.proximal:
        knobs["proximal_logp"] = batch.proximal
    a = batch.token_advantages if case.token_advantages else batch.advantages
    return OBJECTIVES[case.name](batch.stats(), batch.mu, a, batch.segments, **knobs)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{'-'.join(c.knobs) or 'defaults'}")
def test_is_the_written_out_loss(case: Case, kind: str) -> None:
    batch = ragged.make(kind)
    out = run(case, batch)
    want = aggregate(token_losses(case, batch), aggregation_of(case), MAX_TOKENS)
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch), rtol=1e-11, atol=1e-13)
    assert gradient(want, batch).any()


def test_every_entry_of_the_table_is_covered() -> None:
    assert {c.name for c in CASES} | {"m2po"} == set(OBJECTIVES)


def test_the_bounds_act_in_these_batches() -> None:
    """A case whose clip never acts would check r A alone."""
    for case in CASES:
        out = run(case, ragged.make())
        acted = [v for k, v in out.metrics.items() if k in ("clip_fraction", "masked_fraction", "truncated_fraction")]
        unbounded = case.knobs.get("max_weight", 0) is None and "min_weight" not in case.knobs
        loose = case.name in ("dppo_tv", "sequence_truncated_is") and not case.knobs
        if acted and not unbounded and not loose:
            assert max(acted) > 0, (case.name, case.knobs, out.metrics)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("trust_region_only", [True, False])
@pytest.mark.parametrize("threshold", [1e-9, 0.02, 0.1, 10.0])
def test_m2po_is_algorithm_1(kind: str, trust_region_only: bool, threshold: float) -> None:
    batch = ragged.make(kind)
    out = objectives.m2po(
        batch.stats(),
        batch.mu,
        batch.advantages,
        batch.segments,
        threshold=threshold,
        trust_region_only=trust_region_only,
    )
    losses = ragged.m2po_losses(
        batch.logp(), batch.layout.pick(batch.mu), expand(batch, False), threshold, trust_region_only
    )
    want = aggregate(losses, "token-mean", MAX_TOKENS)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch))


@pytest.mark.parametrize(
    "aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean"]
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_aggregations(aggregation: str, kind: str) -> None:
    batch = ragged.make(kind)
    case = Case("grpo", ragged.ppo)
    out = run(case, batch, aggregation=aggregation, max_tokens=MAX_TOKENS)
    want = aggregate(token_losses(case, batch), aggregation, MAX_TOKENS)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch))


def test_padded_batches_know_their_longest_sequence() -> None:
    batch = ragged.make("padded")
    given, default = (run(Case("dr_grpo", ragged.ppo), batch, **m).loss for m in ({"max_tokens": 8.0}, {}))
    assert batch.layout.shape[1] == 8
    assert given == default


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", ["grpo", "reinforce", "gspo"])
def test_kl_penalty(estimator: str, name: str, weighted: bool) -> None:
    batch = ragged.make("packed_masked")
    case = next(c for c in CASES if c.name == name)
    knobs = {"kl_coefficient": 0.3, "kl_estimator": estimator, "kl_importance_weighted": weighted}
    out = run(case, batch, reference_logp=batch.reference, **knobs)
    formula = {
        "k1": lambda p, q: p - q,
        "k2": lambda p, q: (p - q) ** 2 / 2,
        "k3": lambda p, q: (q - p).exp() - (q - p) - 1,
    }[estimator]
    reference = batch.layout.pick(batch.reference)
    kl = [formula(p, q) for p, q in zip(batch.logp(), reference, strict=True)]
    if weighted:
        against = batch.layout.pick(batch.proximal if case.proximal else batch.mu)
        kl = [(p - m).exp() * k for p, m, k in zip(batch.logp(), against, kl, strict=True)]
    losses = [a + 0.3 * b for a, b in zip(token_losses(case, batch), kl, strict=True)]
    want = aggregate(losses, aggregation_of(case), MAX_TOKENS)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch))
    torch.testing.assert_close(out.metrics["kl_mean"], torch.cat(kl).mean().detach())


def test_entropy_bonus() -> None:
    batch = ragged.make("indexed")
    case = next(c for c in CASES if c.name == "grpo")
    out = run(case, batch, entropy_coefficient=0.2)
    losses = [a - 0.2 * h for a, h in zip(token_losses(case, batch), batch.entropy(), strict=True)]
    want = aggregate(losses, "seq-mean-token-mean", MAX_TOKENS)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch))
    torch.testing.assert_close(out.metrics["entropy_mean"], torch.cat(batch.entropy()).mean().detach())
    assert out.entropy_coefficients is not None


@pytest.mark.parametrize(("mode", "level"), [(m, v) for m in ("truncate", "mask") for v in ("token", "sequence")])
def test_correction_is_a_factor_before_the_clipped_term(mode: str, level: str) -> None:
    """Decoupled PPO: r = pi/pi_prox, times the bounded pi_prox/mu."""
    batch = ragged.make("packed")
    case = Case("grpo", ragged.ppo, proximal=True)
    out = run(case, batch, correction=objectives.Correction(mode, level, minimum=0.8, maximum=1.3))
    losses = []
    for loss, q, m in zip(
        token_losses(case, batch), batch.layout.pick(batch.proximal), batch.layout.pick(batch.mu), strict=True
    ):
        w = (q - m if level == "token" else (q - m).sum().expand_as(q)).exp()
        losses.append(loss * (w.clamp(0.8, 1.3) if mode == "truncate" else w * (w >= 0.8) * (w <= 1.3)))
    want = aggregate(losses, "seq-mean-token-mean", MAX_TOKENS)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch))


def test_token_weights_scale_the_policy_term_alone() -> None:
    batch = ragged.make("padded")
    weights = torch.rand(batch.layout.shape, dtype=torch.float64)
    case = Case("grpo", ragged.ppo)
    more = {"reference_logp": batch.reference, "kl_coefficient": 0.1}
    out = run(case, batch, token_weights=weights, **more)
    losses = [
        w * loss + 0.1 * ((q - p).exp() - (q - p) - 1)
        for w, loss, p, q in zip(
            batch.layout.pick(weights),
            token_losses(case, batch),
            batch.logp(),
            batch.layout.pick(batch.reference),
            strict=True,
        )
    ]
    want = aggregate(losses, "seq-mean-token-mean", MAX_TOKENS)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(gradient(out.loss, batch), gradient(want, batch))
    by_sequence = torch.rand(6, dtype=torch.float64)
    spread = batch.segments.spread(by_sequence, like=batch.mu)
    assert torch.equal(
        run(case, batch, token_weights=by_sequence).coefficients, run(case, batch, token_weights=spread).coefficients
    )


def test_icepop_without_a_proximal_policy_masks_against_the_policy_itself() -> None:
    batch = ragged.make("packed")
    out = objectives.icepop(batch.stats(), batch.mu, batch.advantages, batch.segments, min_weight=0.8, max_weight=1.3)
    want = objectives.token_masked_is(
        batch.stats(),
        batch.mu,
        batch.advantages,
        batch.segments,
        min_weight=0.8,
        max_weight=1.3,
        aggregation="token-mean",
    )
    torch.testing.assert_close(out.coefficients, want.coefficients)
