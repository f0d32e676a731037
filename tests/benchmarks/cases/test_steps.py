"""A step of the steps' comparison is a step: one of a trainer's own loop, and of plain loops that agree with each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("trl")
from benchmarks.cases import steps
from benchmarks.cases.steps import Batch, Work


def make_model() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


TINY = Work("tiny", make_model, steps.byte_tokenizer)


@pytest.mark.parametrize("ours", [False, True])
def test_a_trainer_is_held_before_each_step_and_takes_one(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, step_of = [], torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        taken.append(self)
        return step_of(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    step = steps.trainer_step(TINY, Batch.of(make_model()), steps.GROUP, ours)
    for count in (1, 2, 3):
        step()
        assert len(taken) == count
    step.close()


def test_an_error_of_a_trainer_is_raised_where_its_step_was_asked_for() -> None:
    with pytest.raises(ValueError, match="generation_batch_size"):
        steps.trainer_step(TINY, Batch.of(make_model()), 3, True)


def test_the_plain_loops_of_this_package_have_one_gradient() -> None:
    batch, gradients = Batch.of(make_model()).rows(slice(0, steps.GROUP)), []
    for loss_of in (steps.logits_loss, steps.fused_loss):
        model = make_model()
        loss_of(model, batch)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
