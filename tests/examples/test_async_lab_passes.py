"""The lab's fast paths against plain ones: the stacked sampler, the learner's passes by hand, and the tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.async_lab.model import ModelConfig, Transformer, sample
from examples.async_lab.passes import TrainingPass
from examples.async_lab.stack import ParameterStack, sample_stack
from examples.async_lab.tasks import TASKS
from examples.async_lab.warm_start import generator, model_for

from .async_lab import token_logp

GROUPS, SAMPLES = 3, 4


def stack_of(task: str, runs: int) -> tuple[ParameterStack, Tensor, Tensor]:
    """Different models, prompts [R, G, P] and random numbers [R, G, S, T]."""
    torch.manual_seed(0)
    stack = ParameterStack(model_for(TASKS[task]), runs)
    stack.values.add_(torch.randn_like(stack.values) * 0.05)
    prompts = torch.stack([TASKS[task].prompts(GROUPS, generator(run)) for run in range(runs)])
    uniforms = torch.rand(runs, GROUPS, SAMPLES, TASKS[task].answer_length)
    return stack, prompts, uniforms


@pytest.mark.parametrize("task", TASKS)
def test_recorded_logp_is_the_models_own(task: str) -> None:
    stack, prompts, uniforms = stack_of(task, 3)
    responses, logp = sample_stack(stack, prompts, uniforms)
    for run in range(3):
        expected = token_logp(stack.module(run), prompts[run], responses[run].flatten(0, 1))
        torch.testing.assert_close(logp[run].flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_temperature_is_that_of_the_recorded_logp() -> None:
    stack, prompts, uniforms = stack_of("sort", 1)
    hot, logp = sample_stack(stack, prompts, uniforms, temperature=2.0)
    ids = torch.cat([prompts[0].repeat_interleave(SAMPLES, 0), hot[0].flatten(0, 1)], 1)
    log_p = (stack.module(0)(ids)[:, 12:-1] / 2.0).log_softmax(-1)
    expected = log_p.gather(-1, hot[0].flatten(0, 1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logp[0].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    stack, prompts, _ = stack_of("sort", 1)
    one = prompts[:, :1].expand(-1, 64, -1)
    responses, _ = sample_stack(stack, one, torch.rand(1, 64, 256, 1, generator=generator(0)))
    drawn = torch.bincount(responses.flatten(), minlength=11) / responses.numel()
    expected = stack.module(0)(prompts[0, :1])[0, -1].softmax(-1)
    deviation = (expected * (1 - expected) / responses.numel()).sqrt()
    assert ((drawn - expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn(edge: float) -> None:
    stack, prompts, uniforms = stack_of("sort", 1)
    stack.stacked["head.weight"].zero_()
    bias = stack.stacked["norm.bias"].fill_(1.0)
    stack.stacked["norm.weight"].zero_()
    stack.stacked["head.weight"][0, [0, -1]] = -1e4 / bias.shape[-1]
    responses, logp = sample_stack(stack, prompts, torch.full_like(uniforms, edge))
    assert responses.min() > 0 and responses.max() < 10  # noqa: PT018
    assert (logp > -10).all()


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("task", TASKS)
def test_the_pass_by_hand_equals_autograd(task: str, samples: int) -> None:
    stack, prompts, uniforms = stack_of(task, 2)
    length, prompt_length = TASKS[task].answer_length, TASKS[task].prompt_length
    responses, _ = sample_stack(stack, prompts, uniforms[:, :, :samples])
    training = TrainingPass(stack.config, GROUPS, samples, prompt_length, length)
    upstream = torch.randn(GROUPS * samples, length, stack.config.vocabulary)
    for run in (1, 0, 1):  # one object serves all models, again and again
        model = stack.module(run)
        ids = torch.cat([prompts[run].repeat_interleave(samples, 0), responses[run].flatten(0, 1)], 1)
        expected = model(ids)[:, prompt_length - 1 : -1]
        gradients = torch.autograd.grad((expected * upstream).sum(), list(model.parameters()))
        stack.gradients.fill_(torch.nan)
        logits = training.forward(stack.by_run[run], prompts[run], responses[run])
        training.backward(upstream, stack.gradients_by_run[run])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        flat = torch.cat([g.flatten() for g in gradients])
        torch.testing.assert_close(stack.gradients[run], flat, rtol=1e-4, atol=1e-5 * float(flat.abs().max()))
        assert stack.gradients[1 - run].isnan().all()


def test_greedy_decoding_takes_the_likeliest_token() -> None:
    model, prompts = model_for(TASKS["sort"]), TASKS["sort"].prompts(4, generator(0))
    tokens, _ = sample(model, prompts, 12)
    assert torch.equal(tokens, model(torch.cat([prompts, tokens], 1))[:, 12:-1].argmax(-1))


def test_a_stack_shares_its_memory_with_its_modules() -> None:
    torch.manual_seed(0)
    stack = ParameterStack(Transformer(ModelConfig(5, 6)), 2)
    stack.optimizer_parameters[1].data.fill_(2.0)
    assert all(bool((p == 2.0).all()) for p in stack.module(1).parameters())
    assert not any(bool((p == 2.0).any()) for p in stack.module(0).parameters())


# --- tasks --------------------------------------------------------------------------------------------------


def test_sort_rewards_the_fraction_of_right_places() -> None:
    task = TASKS["sort"]
    prompts = task.prompts(3, generator(0))
    answers = task.answers(prompts)
    assert task.rewards(prompts, answers).tolist() == [1.0, 1.0, 1.0]
    answers[0, :3] = 10
    assert task.rewards(prompts, answers).tolist() == [0.75, 1.0, 1.0]


def test_the_sum_is_written_out_place_by_place() -> None:
    prompt = torch.tensor([[0, 7, 8, 9, 10, 9, 4, 6, 1, 11]])  # 0789 + 9461
    assert TASKS["add"].answers(prompt).tolist() == [[0, 1, 5, 1, 2, 1, 0, 1, 1, 0, 2, 5, 0]]


def test_sums_are_right() -> None:
    task = TASKS["add"]
    prompts = task.prompts(100, generator(0))
    powers = torch.tensor([10000, 1000, 100, 10, 1])
    first, second, total = prompts[:, :4], prompts[:, 5:9], task.answers(prompts)[:, 8:]
    assert torch.equal((first * powers[1:]).sum(1) + (second * powers[1:]).sum(1), (total * powers).sum(1))
    assert prompts.shape[1] == task.prompt_length and prompts[:, 4].eq(10).all()  # noqa: PT018


def test_addition_rewards_the_whole_sum_and_nothing_else() -> None:
    task = TASKS["add"]
    prompts = task.prompts(3, generator(0))
    answers = task.answers(prompts)
    answers[0, 0] += 1  # a wrong scratchpad
    answers[1, -1] += 1  # a wrong sum
    assert task.rewards(prompts, answers).tolist() == [1.0, 0.0, 1.0]
