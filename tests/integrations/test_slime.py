"""slime's documented custom loss and before-train-step hook, called as its Megatron actor calls them.

slime's package on the index is empty, and the actor needs Megatron. The batch, the arguments and the reductions below follow
its documentation (customization.md) and its loss: lists by sample, logits of sequences end to end, a sum of sample means.
"""

from __future__ import annotations

import importlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.integrations.trainer_batches import Batch, batch, vcpo
from vcpo_kernels.integrations import _ess_channel, slime

PROMPT, PADDING = 3, 4


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_ess_channel, "_PROCESS", _ess_channel._Process())
    _ess_channel._PROCESS.warned = True
    yield
    for rate in _ess_channel.attached():
        _ess_channel.detach(rate)


def arguments(**changed: Any) -> Namespace:
    """The arguments that the loss looks at, as slime sets them by default."""
    defaults: dict[str, Any] = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "rollout_top_p": 1.0}
    defaults |= {"rollout_temperature": 1.0, "entropy_coef": 0.0, "use_tis": False, "use_opsm": False}
    defaults |= {"use_kl_loss": False, "recompute_loss_function": False, "custom_pg_loss_reducer_function_path": None}
    return Namespace(**defaults | changed)


def micro_batch(b: Batch, out: vk.VCPOOutput, rows: range, temperature: float = 1.0) -> tuple[dict[str, Any], Tensor]:
    """Sequences of PROMPT prompt tokens and 7 response tokens end to end, then PADDING positions; logits from b.logits.

    The last valid response token of each sample but the last is followed by tokens whose loss mask is 0.
    """
    fields: dict[str, Any] = {"total_lengths": [PROMPT + 7] * len(rows), "response_lengths": [7] * len(rows)}
    for name in ("unconcat_tokens", "loss_masks", "advantages", "rollout_log_probs"):
        fields[name] = []
    pieces = []
    for i in rows:
        fields["unconcat_tokens"].append(torch.cat([torch.full((PROMPT,), 2), b.ids[i]]))
        fields["loss_masks"].append(b.mask[i].int())
        fields["advantages"].append(torch.full((7,), out.advantages[i].item()))
        fields["rollout_log_probs"].append(b.mu[i].float())
        # Position t predicts t + 1: the response's logits start at the prompt's last token, and the last position has none.
        pieces += [torch.zeros(PROMPT - 1, 11), b.logits[i].float() * temperature, torch.zeros(1, 11)]
    pieces.append(torch.full((PADDING, 11), float("nan")))
    return fields, torch.cat(pieces)[None]


def sample_means(fields: dict[str, Any], per_token: bool = False) -> Callable[[Tensor], Tensor]:
    """slime's reducer without context parallelism."""

    def reduce(x: Tensor) -> Tensor:
        parts = zip(x.split(fields["response_lengths"]), fields["loss_masks"], strict=True)
        return sum((v * m).sum() / (1 if per_token else m.sum().clamp(min=1)) for v, m in parts)  # type: ignore[return-value]

    return reduce


@pytest.mark.parametrize("per_token", [False, True])
def test_micro_batches_are_vcpo_loss(per_token: bool) -> None:
    """Two micro-batches, scaled as slime scales them over the global batch, in both of its normalisations."""
    module, _, name = "vcpo_kernels.integrations.slime.vcpo_loss".rpartition(".")
    loss_function = getattr(importlib.import_module(module), name)
    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig(aggregation="token-mean" if per_token else "seq-mean-token-mean"))
    divisor = int(b.mask.sum()) if per_token else 7  # the eighth sample has no valid token
    total, value, reported = torch.zeros_like(b.logits), 0.0, 0.0
    for rows in (range(4), range(4, 8)):
        fields, logits = micro_batch(b, out, rows)
        loss, metrics = loss_function(arguments(), fields, logits, sample_means(fields, per_token))
        total += torch.autograd.grad(loss / divisor, b.logits)[0]
        value += loss.item() / divisor
        reported += metrics["vcpo_log_weight"].item() / divisor
        assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())
    torch.testing.assert_close(total, gradient, rtol=2e-4, atol=1e-6)  # slime's logits are fp32
    assert value == pytest.approx(out.loss.item(), rel=1e-4)
    lengths = b.mask.sum(-1) if per_token else (b.mask.sum(-1) > 0).double()
    assert reported == pytest.approx(((out.log_weights * lengths).sum() / lengths.sum()).item(), rel=1e-4)


def test_temperature_and_entropy() -> None:
    """Logits are divided by the rollout's temperature, and the entropy bonus is slime's."""
    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(8), temperature=0.5)
    args = arguments(rollout_temperature=0.5, entropy_coef=0.3)
    loss, metrics = slime.vcpo_loss(args, fields, logits, sample_means(fields))
    log_p = b.logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    per_sample = torch.where(b.mask, entropy, 0.0).sum(-1) / b.mask.sum(-1).clamp(min=1)
    bonus = torch.autograd.grad(per_sample.sum(), b.logits)[0]
    got = torch.autograd.grad(loss, b.logits)[0]
    torch.testing.assert_close(got, 7 * gradient - 0.3 * bonus, rtol=2e-4, atol=1e-5)
    assert metrics["entropy_loss"].item() == pytest.approx(per_sample.sum().item(), rel=1e-5)
    assert (loss - metrics["pg_loss"]).item() == pytest.approx(-0.3 * per_sample.sum().item(), rel=1e-4)


def test_maximal_weight_comes_from_the_custom_config() -> None:
    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig(max_weight=0.5))
    fields, logits = micro_batch(b, out, range(8))
    loss, metrics = slime.vcpo_loss(arguments(vcpo_max_weight=0.5), fields, logits, sample_means(fields))
    torch.testing.assert_close(torch.autograd.grad(loss, b.logits)[0], 7 * gradient, rtol=2e-4, atol=1e-5)
    assert metrics["vcpo_truncated"].item() == (out.log_weights[:7] > torch.tensor(0.5).log()).sum()


def test_entries_past_the_vocabulary_are_padding() -> None:
    """Megatron pads the vocabulary, with logits that mean nothing; on one tensor rank too."""
    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(8))
    padded = torch.nn.functional.pad(logits, (0, 5), value=50.0)
    loss, _ = slime.vcpo_loss(arguments(vocab_size=11), fields, padded, sample_means(fields))
    torch.testing.assert_close(torch.autograd.grad(loss, b.logits)[0], 7 * gradient, rtol=2e-4, atol=1e-5)


def test_batch_without_valid_tokens_still_reaches_the_logits() -> None:
    """A rank whose samples are all masked runs its backward like the others, with a gradient of zero."""
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(7, 8))
    loss, _ = slime.vcpo_loss(arguments(), fields, logits, sample_means(fields))
    gradient = torch.autograd.grad(loss, b.logits)[0]
    assert not gradient.any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("rollout_top_p", 0.9, "sampled nucleus"),
        ("rollout_top_k", 20, "tokens kept"),
        ("rollout_min_p", 0.1, "tokens kept"),
        ("use_tis", True, "counted twice"),
        ("use_opsm", True, "policy_loss"),
        ("use_kl_loss", True, "Put the penalty into the rewards"),
        ("recompute_loss_function", True, "observed twice"),
        ("custom_pg_loss_reducer_function_path", "a.b", "policy_loss"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(name: str, value: object, why: str) -> None:
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(8))
    with pytest.raises(ValueError, match=f"{name}={value!r} cannot be honoured: .*{why}"):
        slime.vcpo_loss(arguments(**{name: value}), fields, logits, sample_means(fields))


def test_another_split_of_sequences_is_refused() -> None:
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(8))
    with pytest.raises(
        ValueError, match=r"allgather_cp=True cannot be honoured with context_parallel_size > 1: a rank's log"
    ):
        slime.vcpo_loss(arguments(allgather_cp=True, context_parallel_size=2), fields, logits, sample_means(fields))
    slime.vcpo_loss(
        arguments(allgather_cp=True), fields, logits, sample_means(fields)
    )  # with one rank it splits nothing


def test_batches_that_do_not_fit_are_refused() -> None:
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(8))

    def call(logits: Tensor = logits, **changed: Any) -> None:
        slime.vcpo_loss(arguments(), {**fields, **changed}, logits, sample_means(fields))

    with pytest.raises(ValueError, match="batch has no rollout_log_probs"):
        call(rollout_log_probs=None)
    with pytest.raises(ValueError, match=r"logits must be \[1, T, V\]"):
        call(logits[0])
    with pytest.raises(ValueError, match="logits have 40 positions for sequences of 80 tokens"):
        call(logits[:, :40])
    with pytest.raises(ValueError, match="a response of 10 tokens in a sequence of 10 leaves no prompt"):
        call(response_lengths=[10] * 8)
    with pytest.raises(ValueError, match=r"batch\['advantages'\] must have shape \(56,\)"):
        call(advantages=fields["advantages"][:7])


class Megatron:
    """What slime's hook is handed: Megatron's optimizers are no torch optimizers, and hold some, chained or as stubs."""

    def __init__(self, inner: Any = None, chained: list[Any] | None = None) -> None:
        if chained is not None:
            self.chained_optimizers = chained
        else:
            self.optimizer = inner


def hook(optimizer: Any, **changed: Any) -> None:
    slime.before_train_step(arguments(**changed), 0, 0, [None], optimizer, None)


def test_hook_scales_every_inner_optimizer() -> None:
    """Dense and expert parameters in two optimizers of a chain, a stub beside them: one ESS, attached once."""
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    weight, expert = torch.nn.Parameter(b.logits.detach().clone()), torch.nn.Parameter(torch.zeros(1))
    trained = Batch(weight, b.ids, b.mask, b.mu, b.rewards, b.group)
    inner = [torch.optim.AdamW([p], lr=1.0, weight_decay=0.0) for p in (weight, expert)]
    chain = Megatron(chained=[Megatron(inner[0]), Megatron(inner[1]), Megatron(None)])
    for step in range(2):
        hook(chain)
        assert len(_ess_channel.attached()) == 2
        with torch.no_grad():
            weight.copy_(b.logits)
            expert.zero_()
        inner[0].state.clear()  # so that each is Adam's first step, which moves by the rate
        inner[1].state.clear()
        for rows in (range(4), range(4, 8)):
            fields, logits = micro_batch(trained, out, rows)
            loss, metrics = slime.vcpo_loss(arguments(), fields, logits, sample_means(fields))
            loss.backward()
            assert ("vcpo_last_step_ess_ratio" in metrics) == (step > 0)
        expert.grad = torch.ones(1)
        inner[0].step()
        inner[1].step()
        scale = out.ess_ratio.sqrt().item()
        assert (weight - b.logits).abs().max().item() == pytest.approx(scale, rel=1e-3)
        assert expert.item() == pytest.approx(-scale, rel=1e-3)
        weight.grad = None


def test_hook_forgets_a_skipped_step() -> None:
    """Megatron skips a step of non-finite gradients; its observations are no part of the next."""
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    hook(Megatron(optimizer), vcpo_ess_rule="linear", vcpo_ess_reference=0.5)
    fields, logits = micro_batch(b, out, range(8))
    slime.vcpo_loss(arguments(), fields, logits, sample_means(fields))[0].backward()
    hook(Megatron(optimizer))
    (rate,) = _ess_channel.attached()
    assert rate.exponent == 1
    assert rate.reference == 0.5
    rate.observe(torch.zeros(4))
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -1.0


def test_hook_without_a_torch_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"found no torch\.optim.Optimizer inside Megatron"):
        hook(Megatron(None))


def test_the_pages_paths_and_keys_are_ours() -> None:
    """Every import path of docs/slime.md resolves as slime resolves it, and every key of its YAML is one that is read."""
    text = Path("docs/slime.md").read_text()
    paths = re.findall(r"-path (vcpo_kernels[.\w]+)", text)
    assert len(paths) == 2
    for path in paths:
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    source = Path(slime.__file__).read_text()
    keys = re.findall(r"^(vcpo_\w+):", text, re.MULTILINE)
    assert len(keys) == 3
    assert all(f'"{key}"' in source for key in keys)
