"""What the tests of the TRL integration share: a tiny model and tokenizer made on the spot, prompts, and recorded rollouts.

`Rollouts` stands in for a sampler: what it returns depends on the prompt and the sample's number alone, so that one process
and several see the same data, and the tests know every sequence without asking the trainer.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries read it: nothing is looked up
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn

from tests.sequences import brute_force
from vcpo_kernels.integrations.trl import VCPOTrainer, VCPOTrainingConfig

GROUP = 4
PROMPTS = [f"say {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


def tokenizer() -> Any:
    """Byte-level BPE without merges: every string is its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def model(seed: int = 0, **changes: Any) -> nn.Module:
    """A Llama of 2 layers of 32, with logits of standard deviation about 1."""
    sizes = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    made: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        made.get_output_embeddings().weight.normal_(std=0.2)
    return made


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def arguments(folder: Path, config: type = VCPOTrainingConfig, **changes: Any) -> Any:
    """A configuration for a CPU: three steps of SGD, so that a step's gradient can be read off, nothing reported."""
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": GROUP, "max_completion_length": 8, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    return config(**{**defaults, **changes})


@dataclass
class Sequence:
    """One completion: what the sampler returned, and its reward."""

    prompt: list[int]
    completion: list[int]
    behavior_logp: list[float]
    reward: float


@dataclass
class Rollouts:
    """A rollout_func. with_logp: whether the sampler records log mu. calls: every call's sequences, in order.

    spread: standard deviation of the recorded log mu around the initial policy's typical one; long tails make ESS fall.
    """

    with_logp: bool = True
    spread: float = 0.25
    calls: list[list[Sequence]] = field(default_factory=list)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen: dict[str, int] = {}
        sequences = []
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
            sequences.append(self.sequence(prompt, seen[prompt]))
        self.calls.append(sequences)
        logps = [s.behavior_logp for s in sequences] if self.with_logp else None
        return {
            "prompt_ids": [s.prompt for s in sequences],
            "completion_ids": [s.completion for s in sequences],
            "logprobs": logps,
        }

    def sequence(self, prompt: str, number: int) -> Sequence:
        draw = torch.Generator().manual_seed(100 * PROMPTS.index(prompt) + number)
        length = int(torch.randint(2, 8, (), generator=draw))
        ids = [*torch.randint(2, 258, (length,), generator=draw).tolist(), 1]
        logp = (-5.6 + self.spread * torch.randn(length + 1, generator=draw)).tolist()
        return Sequence(tokenizer()(prompt).input_ids, ids, logp, reward_of(ids))


def reward_of(ids: list[int]) -> float:
    return float(sum(ids) % 7)


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


class GradientRecorder(transformers.TrainerCallback):
    """Parameters and gradients just before each optimizer step."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        bare = getattr(model, "module", model)
        self.gradients.append({n: p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None})
        self.models.append({n: p.detach().clone() for n, p in bare.named_parameters()})


def trainer(
    folder: Path, rollouts: Rollouts | None = None, base: nn.Module | None = None, **changes: Any
) -> VCPOTrainer:
    made = VCPOTrainer(
        model() if base is None else base,
        reward,
        arguments(folder, **changes),
        dataset(),
        processing_class=tokenizer(),
        rollout_func=Rollouts() if rollouts is None else rollouts,
    )
    made.recorder = GradientRecorder()
    made.add_callback(made.recorder)
    return made


# --- the direct formula, one sequence at a time in float64, sharing nothing with the package --------------------------


def float64_copy(of: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    config = copy.deepcopy(of.config)
    config._attn_implementation = "eager"
    fresh = type(of)(config).double()
    fresh.load_state_dict({n: p.double() for n, p in parameters.items()}, strict=False)
    return fresh.train()


def token_logits(policy: nn.Module, sequence: Sequence, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits that predict the completion's tokens [C, V], and their ids [C]."""
    ids = torch.tensor([sequence.prompt + sequence.completion])
    logits = policy(input_ids=ids).logits[0, len(sequence.prompt) - 1 : -1] / temperature
    return logits, ids[0, len(sequence.prompt) :]


def token_logp(policy: nn.Module, sequence: Sequence, temperature: float = 1.0) -> Tensor:
    logits, ids = token_logits(policy, sequence, temperature)
    return logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


def logit_norm(policy: nn.Module, sequence: Sequence, temperature: float = 1.0) -> float:
    with torch.no_grad():
        logits, ids = token_logits(policy, sequence, temperature)
        score = nn.functional.one_hot(ids, logits.shape[1]) - logits.softmax(-1)
    return float(score.square().sum())


def exact_norm(policy: nn.Module, sequence: Sequence) -> float:
    gradients = torch.autograd.grad(token_logp(policy, sequence).sum(), list(policy.parameters()), allow_unused=True)
    return sum(float(g.square().sum()) for g in gradients if g is not None)


def expected(
    policy: nn.Module, sequences: list[Sequence], mu: list[Tensor], norms: list[float], **options: Any
) -> brute_force.Expected:
    """VCPO of a window whose groups are consecutive."""
    with torch.no_grad():
        temperature = options.pop("temperature", 1.0)
        log_weights = [
            float((token_logp(policy, s, temperature) - m).sum()) for s, m in zip(sequences, mu, strict=True)
        ]
    groups = [i // GROUP for i in range(len(sequences))]
    lengths, rewards = [len(s.completion) for s in sequences], [s.reward for s in sequences]
    return brute_force.vcpo(log_weights, lengths, rewards, groups, norms, groups[-1] + 1, **options)


def direct_gradient(
    policy: nn.Module, sequences: list[Sequence], coefficients: list[float], temperature: float = 1.0
) -> dict[str, Tensor]:
    """-sum_i c_i grad sum_t logp_t by plain autograd."""
    policy.zero_grad()
    for s, c in zip(sequences, coefficients, strict=True):
        (-c * token_logp(policy, s, temperature).sum()).backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of two gradients as one vector each; and their lengths agree."""
    x, y = (torch.cat([g[n].double().flatten() for n in sorted(b)]) for g in (a, b))
    torch.testing.assert_close(x.norm(), y.norm(), rtol=1e-4, atol=0.0)
    return float(x @ y / (x.norm() * y.norm()))


def recorded_mu(sequences: list[Sequence]) -> list[Tensor]:
    return [torch.tensor(s.behavior_logp, dtype=torch.float64) for s in sequences]
