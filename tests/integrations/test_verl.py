"""verl's own registries, config classes and aggregation: what this package registers there is VCPO's loss, micro-batch by
micro-batch, and what it cannot do it refuses.

Runs where verl is installed, as `make test-verl` installs it. The estimators' formulas, which
need no verl, are in test_verl_estimators.py.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vcpo_kernels as vk
from tests.integrations.trainer_batches import Batch, batch, token_advantages, vcpo
from vcpo_kernels.integrations import _ess_channel
from vcpo_kernels.integrations import verl as plugin

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: make test-verl")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_ess_channel, "_PROCESS", _ess_channel._Process())
    _ess_channel._PROCESS.warned = True
    plugin.register()
    yield
    for rate in _ess_channel.attached():
        _ess_channel.detach(rate)


def actor_config(**global_batch_info: Any) -> Any:
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=2)
    config.global_batch_info.update({"dp_size": 1, **global_batch_info})
    return config


def call(name: str, b: Batch, rows: slice, advantages: torch.Tensor, mode: str, config: Any, **kw: Any) -> Any:
    """As verl's ppo_loss calls a registered loss, with padding of zeros."""
    logp = torch.where(b.mask, b.logp(), 0.0)
    return core_algos.get_policy_loss_fn(name)(
        old_log_prob=b.mu.nan_to_num()[rows],
        log_prob=logp[rows],
        advantages=advantages.nan_to_num()[rows],
        response_mask=b.mask[rows],
        loss_agg_mode=mode,
        config=config,
        **{"rollout_is_weights": None, **kw},
    )


def in_a_process(code: str, first_on_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(first_on_path), str(Path(__file__).parents[2]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_signatures_are_verls() -> None:
    """Every parameter that verl's own losses and estimators have, by name, order and default."""
    ours = inspect.signature(core_algos.POLICY_LOSS_REGISTRY["vcpo"])
    theirs = inspect.signature(core_algos.POLICY_LOSS_REGISTRY["vanilla"])
    assert list(ours.parameters) == list(theirs.parameters)
    assert [p.default for p in ours.parameters.values()] == [p.default for p in theirs.parameters.values()]
    otb = inspect.signature(core_algos.ADV_ESTIMATOR_REGISTRY["optimal_token_baseline"]).parameters
    opob = inspect.signature(core_algos.ADV_ESTIMATOR_REGISTRY["opob"]).parameters
    assert {"token_level_rewards", "response_mask", "index", "old_log_probs", "sum_pi_squared"} <= set(otb) & set(opob)
    assert core_algos.ADV_ESTIMATOR_REGISTRY["opob_length"] is plugin.opob_length


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_micro_batches_add_up_to_vcpo_loss(mode: str) -> None:
    """Two micro-batches on each of two ranks, with the counts that verl's engine puts into the config."""
    b = batch()
    sequences, tokens, ranks = 7, int(b.mask.sum()), 2  # the eighth sequence is empty
    out, gradient = vcpo(b, vk.VCPOConfig(aggregation=mode, max_tokens=16))
    config = actor_config(dp_size=ranks, batch_num_tokens=tokens, global_batch_size=sequences, loss_scale_factor=16)
    total, value = torch.zeros_like(b.logits), 0.0
    for start in (0, 2, 4, 6):
        loss, metrics = call("vcpo", b, slice(start, start + 2), token_advantages(b, out), mode, config)
        total += torch.autograd.grad(loss, b.logits)[0] / ranks  # DDP and FSDP take the mean over ranks
        value += loss.item() / ranks
        assert all(isinstance(v, float) for v in metrics.values())
    torch.testing.assert_close(total, gradient, rtol=1e-6, atol=1e-9)  # verl adds 1e-8 to sequence lengths
    assert value == pytest.approx(out.loss.item(), rel=1e-6)


def test_decoupled_mode_takes_the_rest_of_the_ratio_from_verl() -> None:
    """pi_theta / mu = (pi_theta / pi_old) (pi_old / mu), the second factor by verl's own function."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig(aggregation="token-mean"))
    old = b.logp().detach() + 0.1
    mu = b.mu.nan_to_num()
    ratio, _ = compute_rollout_correction_weights(old - mu, b.mask.double(), "sequence", 1e8)
    config = actor_config(batch_num_tokens=int(b.mask.sum()))
    moved = Batch(b.logits, b.ids, b.mask, old, b.rewards, b.group)
    loss, metrics = call(
        "vcpo_decoupled", moved, slice(None), token_advantages(b, out), "token-mean", config, rollout_is_weights=ratio
    )
    torch.testing.assert_close(torch.autograd.grad(loss, b.logits)[0], gradient, rtol=1e-6, atol=1e-9)
    assert metrics["actor/vcpo_ess_ratio"] == pytest.approx(out.ess_ratio.item(), rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    b = batch()
    config, ones = actor_config(batch_num_tokens=9), torch.ones(8, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="bypass_mode=True, or loss_mode=vcpo_decoupled"):
        call("vcpo", b, slice(None), ones, "token-mean", config, rollout_is_weights=ones)
    with pytest.raises(ValueError, match="rollout_is_weights is None"):
        call("vcpo_decoupled", b, slice(None), ones, "token-mean", config)
    token = torch.rand(8, 7, dtype=torch.float64) + 0.5
    with pytest.raises(ValueError, match="rollout_is=sequence"):
        call("vcpo_decoupled", b, slice(None), ones, "token-mean", config, rollout_is_weights=token)
    with pytest.raises(TypeError, match="ActorConfig with global_batch_info, got None"):
        call("vcpo", b, slice(None), ones, "token-mean", None)
    with pytest.raises(ValueError, match="dp_size > 1"):  # verl's own words: the counts of the whole batch are missing
        call("vcpo", b, slice(None), ones, "token-mean", actor_config(dp_size=2))
    with pytest.raises(TypeError, match="options must be a PolicyLossOptions"):
        plugin.register_policy_loss("mine", {"max_weight": 2.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="behavior must be one of 'old_log_prob'"):
        plugin.PolicyLossOptions(behavior="mu")


def test_own_settings_go_by_name() -> None:
    plugin.register_policy_loss("vcpo_tight", plugin.PolicyLossOptions(max_weight=0.5))
    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig(aggregation="token-mean", max_weight=0.5))
    config = actor_config(batch_num_tokens=int(b.mask.sum()))
    loss, _ = call("vcpo_tight", b, slice(None), token_advantages(b, out), "token-mean", config)
    torch.testing.assert_close(torch.autograd.grad(loss, b.logits)[0], gradient, rtol=1e-9, atol=1e-12)


def test_optimizer_from_verls_config_steps_by_ess() -> None:
    """verl builds the optimizer by name; its steps take the ESS of both micro-batches, and the metrics say it afterwards."""
    from verl.workers.config.optimizer import FSDPOptimizerConfig, build_optimizer

    optim = FSDPOptimizerConfig(
        lr=1.0,
        weight_decay=0.0,
        optimizer="EssAdamW",
        optimizer_impl="vcpo_kernels.integrations.verl",
        override_optimizer_config={"ess_rule": "linear"},
    )
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    weight = torch.nn.Parameter(b.logits.detach().clone())
    trained = Batch(weight, b.ids, b.mask, b.mu, b.rewards, b.group)
    optimizer = build_optimizer([weight], optim)
    config = actor_config(batch_num_tokens=int(b.mask.sum()))
    for rows in (slice(0, 4), slice(4, 8)):
        loss, metrics = call("vcpo", trained, rows, token_advantages(b, out), "token-mean", config)
        assert "actor/vcpo_last_step_ess_ratio" not in metrics
        loss.backward()
    optimizer.step()
    moved = (weight - b.logits).abs().max().item()  # Adam's first step moves by the rate
    assert moved == pytest.approx(out.ess_ratio.item(), rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 1.0
    _, metrics = call("vcpo", trained, slice(0, 4), token_advantages(b, out), "token-mean", config)
    assert metrics["actor/vcpo_last_step_ess_ratio"] == pytest.approx(out.ess_ratio.item())
    assert metrics["actor/vcpo_last_step_lr_scale"] == pytest.approx(out.ess_ratio.item())
    optimizer.detach()
    assert not _ess_channel.attached()


def test_the_pages_settings_are_verls() -> None:
    """Each key of docs/verl.md's two blocks is in verl's configuration, and each name of ours among them is registered."""
    import verl
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(verl.__file__).parent / "trainer/config/_generated_ppo_trainer.yaml")
    lines = re.findall(r"^([a-z][\w.]+)=(\S+)$", Path("docs/verl.md").read_text(), re.MULTILINE)
    assert len(lines) == 15
    missing = object()
    for key, value in lines:
        section, _, name = key.rpartition(".")
        assert name in OmegaConf.select(config, section, default=missing), key
        if name == "loss_mode":
            assert core_algos.get_policy_loss_fn(value)
        if name == "adv_estimator":
            assert core_algos.get_adv_estimator_fn(value)


def test_through_verls_own_ppo_loss() -> None:
    """The function its workers call: padded fields of the batch, log-probabilities end to end, entropy taken off in place."""
    losses = pytest.importorskip("verl.workers.utils.losses", reason="verl's workers have further dependencies")
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig(aggregation="token-mean"))
    fields = {"prompts": torch.ones(8, 2, dtype=torch.int64), "responses": b.ids, "response_mask": b.mask.long()}
    fields |= {"attention_mask": torch.ones(8, 9, dtype=torch.int64), "old_log_probs": b.mu.nan_to_num()}
    data = TensorDict(fields | {"advantages": token_advantages(b, out).nan_to_num()}, batch_size=8)
    counts = {"dp_size": 1, "batch_num_tokens": int(b.mask.sum()), "global_batch_size": 7}
    tensordict_utils.assign_non_tensor(data, **counts)
    weight = torch.nn.Parameter(b.logits.detach().clone())
    log_p = weight.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logp = Batch(weight, b.ids, b.mask, b.mu, b.rewards, b.group).logp()
    # Entry j of a sequence is about token j + 1: one prompt token before the response's entries, one entry to spare after them.
    outputs = {k: torch.nn.functional.pad(v, (1, 1)).flatten() for k, v in (("log_probs", logp), ("entropy", entropy))}
    config = FSDPActorConfig(
        rollout_n=4, ppo_micro_batch_size_per_gpu=8, entropy_coeff=0.3, policy_loss=PolicyLossConfig(loss_mode="vcpo")
    )
    optimizer = plugin.EssAdamW([weight], lr=1.0, weight_decay=0.0)
    loss, metrics = losses.ppo_loss(config, outputs, data)
    loss.backward()
    log_p = weight.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    bonus = torch.autograd.grad(torch.where(b.mask, entropy, 0.0).sum() / b.mask.sum(), weight)[0]
    torch.testing.assert_close(weight.grad, gradient - 0.3 * bonus, rtol=1e-6, atol=1e-9)
    assert metrics["actor/vcpo_ess_ratio"].aggregate() == pytest.approx(out.ess_ratio.item())
    optimizer.step()
    assert optimizer.ess_rate.ratio is not None
    assert optimizer.ess_rate.ratio.item() == pytest.approx(out.ess_ratio.item())


def test_verl_loads_the_plugin_by_its_entry_point(tmp_path: Path) -> None:
    """`import verl` alone registers everything: verl loads what the installed package's group names and calls nothing."""
    code = (
        "import verl, sys; assert 'vcpo_kernels.integrations.verl_plugin' in sys.modules;"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn, get_adv_estimator_fn;"
        "print(get_policy_loss_fn('vcpo').__name__, get_policy_loss_fn('vcpo_decoupled').__name__,"
        " get_adv_estimator_fn('opob').__name__)"
    )
    done = in_a_process(code, tmp_path)
    assert done.stdout.split() == ["vcpo", "vcpo_decoupled", "opob"], done.stderr


def test_external_module_hands_over_log_probs(tmp_path: Path) -> None:
    """VERL_USE_EXTERNAL_MODULES is imported in the midst of `import verl`, and finds the trainer's module importable."""
    pytest.importorskip("verl.trainer.ppo.ray_trainer", reason="verl's trainer has further dependencies")
    (tmp_path / "my_verl_setup.py").write_text(
        "from vcpo_kernels.integrations.verl import hand_over_log_probs\nhand_over_log_probs()\n"
    )
    code = "import verl.trainer.ppo.ray_trainer as trainer; print(trainer.compute_advantage.hands_over_log_probs)"
    done = in_a_process(code, tmp_path, VERL_USE_EXTERNAL_MODULES="my_verl_setup")
    assert done.stdout.split() == ["True"], done.stderr


def test_estimators_through_verls_compute_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    """hand_over_log_probs on verl's trainer module: opob gets what it needs, every other estimator is as before."""
    ray_trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer", reason="verl's trainer has further dependencies")
    import numpy as np
    from verl import DataProto

    original = ray_trainer.compute_advantage
    monkeypatch.setattr(ray_trainer, "compute_advantage", original)  # put back afterwards
    monkeypatch.setattr(plugin, "COMPUTE_ADVANTAGE", ("verl.trainer.ppo.ray_trainer",))
    generator = torch.Generator().manual_seed(0)
    rewards = torch.zeros(4, 3)
    rewards[:, -1] = torch.rand(4, generator=generator)
    old, rollout = (-torch.rand(4, 3, generator=generator) for _ in range(2))
    sum_p_squared = old.exp().square() + 0.1

    def data() -> Any:
        tensors = {"token_level_rewards": rewards, "response_mask": torch.ones(4, 3)}
        tensors |= {"old_log_probs": old, "rollout_log_probs": rollout, "sum_pi_squared": sum_p_squared}
        return DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.array(["a", "b", "a", "b"], dtype=object)})

    with pytest.raises(ValueError, match=r"handed over no old_log_probs, rollout_log_probs, sum_pi_squared. Call"):
        original(data(), adv_estimator="opob")
    assert plugin.hand_over_log_probs() == ["verl.trainer.ppo.ray_trainer"]
    wrapped = ray_trainer.compute_advantage
    assert wrapped is not original
    plugin.hand_over_log_probs()
    assert ray_trainer.compute_advantage is wrapped, "a second call wraps nothing again"
    groups = torch.tensor([0, 1, 0, 1])
    for name, sqnorm in (("opob", (1 - 2 * old.exp() + sum_p_squared).sum(-1)), ("opob_length", torch.full((4,), 3.0))):
        result = wrapped(data(), adv_estimator=name, config={"norm_adv_by_std_in_grpo": False})
        base = vk.off_policy_baseline(rewards.sum(-1), (old - rollout).sum(-1), sqnorm, groups)[groups]
        torch.testing.assert_close(result.batch["advantages"], (rewards.sum(-1) - base)[:, None].expand(4, 3))
        torch.testing.assert_close(result.batch["returns"], result.batch["advantages"])
    for estimator in ("grpo", "rloo", core_algos.AdvantageEstimator.GRPO):
        theirs, ours = original(data(), adv_estimator=estimator), wrapped(data(), adv_estimator=estimator)
        assert torch.equal(ours.batch["advantages"], theirs.batch["advantages"])
