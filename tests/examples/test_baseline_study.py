"""The baseline study's numbers, on a tiny model: variances and sums against per-sample gradients written out."""

from __future__ import annotations

import pytest
import torch

import vcpo_kernels as vk

pytest.importorskip("transformers", reason="the study's models are Hugging Face's: pip install transformers")
pytest.importorskip("typer")
from examples import baseline_study as study
from tests.head import tiny_models
from tests.sequence_gradients.models import oracle

SAMPLES, LENGTH = 6, 9


@pytest.fixture
def rollouts() -> study.Rollouts:
    ids = torch.randint(3, tiny_models.VOCABULARY, (SAMPLES, LENGTH))
    mask = (torch.arange(LENGTH) >= 4) & (torch.arange(LENGTH) < torch.tensor([9, 7, 8, 9, 6, 9])[:, None])
    logp = vk.token_stats(tiny_models.make("llama, tied")(ids).logits, ids, mask, shift=True).logp.detach()
    return study.Rollouts(ids, mask, logp + 0.2 * torch.randn_like(logp), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("name", study.BASELINES)
def test_variance_is_that_of_the_per_sample_terms(name: str, rollouts: study.Rollouts) -> None:
    model, x = tiny_models.make("llama, tied"), rollouts
    seg = vk.Segments.padded(x.mask)
    exact = oracle(model, lambda m: seg.sum(vk.token_stats(m(x.ids).logits, x.ids, x.mask, shift=True).logp), SAMPLES)
    gradients = torch.cat([g.flatten(1) for g in exact.gradients.values()], 1)
    m = study.measure(model, x)
    torch.testing.assert_close(m.norms["exact"], exact.norms, rtol=1e-5, atol=0)
    held_out, in_sample = study.variance(name, x.rewards, m)
    n = SAMPLES // 2
    want = [0.0, 0.0]
    for h in range(2):
        half = slice(h * n, (h + 1) * n)
        judged, r = torch.arange(SAMPLES) // n == h, x.rewards[half].double()
        for place, source in enumerate((~judged, judged)):
            b = torch.full_like(r, study.baseline(name, x.rewards, m, source))
            if name == "leave-one-out":
                b = (r.sum() - r) / (n - 1)
            terms = (m.weights[half] * (r - b))[:, None] * gradients[half]
            want[place] += float(terms.var(0).sum()) / 2
    assert held_out == pytest.approx(want[0], rel=1e-4)
    assert in_sample == pytest.approx(want[1], rel=1e-4)


def test_summary_and_picture(rollouts: study.Rollouts, tmp_path: object) -> None:
    m = study.measure(tiny_models.make("llama, tied"), rollouts)
    result = study.summary([(rollouts, m), (rollouts, m)])
    assert result["informative"] == 2
    assert result["correlation_pooled"].keys() == set(study.CHEAP_NORMS)
    assert all(len(v) == 2 for v in result["variance_held_out"].values())
    study.draw(result, tmp_path / "study.png")  # type: ignore[operator]
    assert (tmp_path / "study.png").stat().st_size > 10_000  # type: ignore[operator]


def test_answers_are_read_off_the_end() -> None:
    assert study._last_number("12 + 5 = 17.") == 17
    assert study._last_number("no idea") is None
