"""Start verl's own entry point on what `prepare` made, and show what it logged: see `examples/verl_cpu/__init__.py`."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import examples.verl_cpu
from examples.loops import rollouts

ROOT = Path(__file__).parents[2]
PROMPTS_PER_STEP, RESPONSE = 8, rollouts.LENGTH - rollouts.PROMPT  # a response's tokens

# docs/verl.md, Settings: decoupled mode.
VCPO = {
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.rollout_is": "sequence",
    "algorithm.rollout_correction.rollout_is_threshold": "1e8",
    "algorithm.rollout_correction.rollout_is_batch_normalize": False,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vcpo_decoupled",
    "actor_rollout_ref.actor.optim.optimizer_impl": "vcpo_kernels.integrations.verl",
    "actor_rollout_ref.actor.optim.optimizer": "EssAdamW",
    "algorithm.adv_estimator": "opob_length",
}
# One optimizer step a batch of prompts, in micro-batches on two actors.
RUN = {
    "data.train_batch_size": PROMPTS_PER_STEP,
    "data.max_prompt_length": rollouts.PROMPT,
    "data.max_response_length": RESPONSE,
    "actor_rollout_ref.rollout.n": rollouts.SAMPLES,
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS_PER_STEP,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
    "actor_rollout_ref.actor.optim.lr": "1e-3",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
    "trainer.n_gpus_per_node": 2,
    "trainer.total_epochs": 1,
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.save_freq": -1,
    "trainer.logger": "[console,file]",
    "trainer.project_name": "verl_cpu",
    "trainer.experiment_name": "verl_cpu",
}
# In a GPU's place, and in an inference server's.
STAND_INS = {
    "trainer.device": "cpu",
    "trainer.use_v1": False,  # the v1 trainers hand rollouts over by a transfer queue
    "data.dataloader_num_workers": 0,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",  # not flash-attention,
    "actor_rollout_ref.model.use_remove_padding": False,  # which this wants too
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision": "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "actor_rollout_ref.rollout.name": "initial_policy",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": "examples.verl_cpu.sampler.Sampler",
    "+actor_rollout_ref.rollout.checkpoint_manager_class": "examples.verl_cpu.sampler.NoWeightSync",
    "ray_kwargs.ray_init.num_cpus": 8,  # of Ray's account alone, as are the two "GPUs"
    "+ray_kwargs.ray_init.num_gpus": 2,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init._node_ip_address": "127.0.0.1",
}
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "examples.verl_cpu.external",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def prepare(folder: Path, prompts: int) -> None:
    """A model, a tokenizer whose words are its ids, and prompts, as verl reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = ["<pad>", "<bos>", "<eos>", *map(str, range(3, rollouts.VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = rollouts.tiny_model()
    model.config.pad_token_id = 0
    for made in (tokenizer, model):
        made.save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words[3:], k=rollouts.PROMPT)) for _ in range(prompts)]
    fixed = {"data_source": "even_numbers", "reward_model": {"style": "rule", "ground_truth": ""}}
    rows = [
        {**fixed, "prompt": [{"role": "user", "content": t}], "extra_info": {"index": i}} for i, t in enumerate(texts)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def train(folder: Path, steps: int, timeout: float | None = None) -> list[dict[str, Any]]:
    """What verl logged at each step. Its output goes to folder/verl.log.

    Raises SystemExit where it fails, subprocess.TimeoutExpired after `timeout` seconds.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, steps * PROMPTS_PER_STEP)
    paths = {
        "actor_rollout_ref.model.path": folder / "model",
        "data.train_files": folder / "prompts.jsonl",
        "data.val_files": folder / "prompts.jsonl",
        "trainer.default_local_dir": folder / "checkpoints",
        "hydra.run.dir": folder / "hydra",
    }
    settings = VCPO | RUN | STAND_INS | paths | {"trainer.total_training_steps": steps}
    environment = os.environ | ENVIRONMENT | {"VERL_FILE_LOGGER_PATH": str(folder / "steps.jsonl")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *(f"{key}={value}" for key, value in settings.items())]
    with (folder / "verl.log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=timeout)
    if done.returncode:
        raise SystemExit(f"verl ended with status {done.returncode}:\n{(folder / 'verl.log').read_text()[-4000:]}")
    return [json.loads(line)["data"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=examples.verl_cpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/verl_cpu"), help="model, prompts, metrics and verl's output"
    )
    arguments = parser.parse_args()
    print(f"verl's output goes to {arguments.out / 'verl.log'}", flush=True)
    logged = train(arguments.out, arguments.steps)
    # The loss logs ESS and rate of the step before; the last step's are logged by none.
    for step, (data, after) in enumerate(zip(logged, [*logged[1:], {}], strict=True), 1):
        ess, scale = (after.get(f"actor/vcpo_last_step_{name}") for name in ("ess_ratio", "lr_scale"))
        shown = "" if ess is None else f"  ESS/B {ess:.3f}  rate x {scale:.3f}"
        print(f"step {step}: gradient norm {data['actor/grad_norm']:.3f}{shown}")


if __name__ == "__main__":
    main()
