"""A sampler in the place of vLLM or SGLang, through verl's extension points.

It is the policy as it was before training and stays it, so that rollouts get ever staler: what VCPO is for. It records the
log-probability of each token that it draws (`rollout_log_probs`), as `rollout.calculate_log_probs=True` asks of a server.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl import DataProto
from verl.workers.rollout import base, replica

NAME = "initial_policy"  # rollout.name


class NoEngine(base.BaseRollout):
    """A worker's end of an inference engine."""

    async def resume(self, tags: list[str]) -> None: ...

    async def update_weights(self, weights: Any, **kwargs: Any) -> None: ...

    async def release(self) -> None: ...


class NoServer(replica.RolloutReplica):
    """A server's handle."""

    async def launch_servers(self) -> None:
        self._server_address = f"127.0.0.1:{self.replica_rank}"


class NoWeightSync:
    """rollout.checkpoint_manager_class: sends no weights to the sampler."""

    def __init__(self, config: Any, actor_wg: Any, replicas: Any) -> None: ...

    def sleep_replicas(self) -> None: ...

    def update_weights(self, global_steps: int | None = None) -> None: ...


class Sampler:
    """rollout.agent.agent_loop_manager_class: prompts in, responses with log-probabilities and rewards out."""

    @classmethod
    def create(cls, config: Any, **clients: Any) -> Sampler:
        return cls(config.actor_rollout_ref)

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        self.config = config.rollout
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path).eval()

    @torch.no_grad()
    def generate_sequences(self, batch: DataProto) -> DataProto:
        chats = batch.non_tensor_batch["raw_prompt"]
        texts = [self.tokenizer.apply_chat_template(list(chat), tokenize=False) for chat in chats]
        prompts = self.tokenizer(texts, padding="max_length", max_length=self.config.prompt_length, return_tensors="pt")
        ids, attention, logps = prompts.input_ids, prompts.attention_mask, []
        for _ in range(self.config.response_length):
            logits = self.model(ids, attention_mask=attention, position_ids=positions(attention)).logits[:, -1]
            # From the whole distribution: where top-k or top-p cut it, these would not be the policy's probabilities.
            token = logits.softmax(-1).multinomial(1)
            logps.append(logits.log_softmax(-1).gather(1, token))
            ids, attention = torch.cat([ids, token], 1), torch.cat([attention, torch.ones_like(token)], 1)
        return self._as_verl_wants(ids, prompts.attention_mask, torch.cat(logps, 1))

    def _as_verl_wants(self, ids: Tensor, prompt_mask: Tensor, logp: Tensor) -> DataProto:
        """ids [B, P + R], prompt_mask [B, P], logp [B, R]."""
        prompts, responses = ids.split([prompt_mask.shape[1], logp.shape[1]], 1)
        ends = (responses == self.tokenizer.eos_token_id).long()
        mask = (ends.cumsum(-1) - ends == 0).long()  # the first end itself counts
        attention = torch.cat([prompt_mask, mask], 1)
        scores = torch.zeros_like(logp)
        scores[torch.arange(len(ids)), mask.sum(-1) - 1] = even_share(responses, mask)
        tensors = {
            "prompts": prompts, "responses": responses, "response_mask": mask, "input_ids": ids,
            "attention_mask": attention, "position_ids": positions(attention),
            "rollout_log_probs": logp * mask, "rm_scores": scores,
        }  # fmt: skip
        nothing = np.array([{} for _ in ids], dtype=object)
        others = {"multi_modal_inputs": nothing, "__num_turns__": np.full(len(ids), 2, dtype=np.int32)}
        made = DataProto.from_dict(tensors=tensors, non_tensors=others)
        made.meta_info.update(timing={}, reward_extra_keys=[], metrics=[])
        return made


def positions(attention: Tensor) -> Tensor:
    """Of left-padded rows: the first token that counts is at 0."""
    return (attention.cumsum(-1) - 1).clamp(min=0)


def even_share(responses: Tensor, mask: Tensor) -> Tensor:
    """The reward: which share of a response's tokens are even numbers."""
    return ((responses % 2 == 0) & mask.bool()).sum(-1) / mask.sum(-1)


def register() -> None:
    """As the rollout NAME; a second call changes nothing."""
    base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.NoEngine"
    replica.RolloutReplicaRegistry.register(NAME, lambda: NoServer)
