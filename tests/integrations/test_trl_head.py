"""VCPOTrainer's head: models whose logits it computes train, the others are refused before anything is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="pip install trl")
import transformers

from tests.integrations import trl_setup as setup


def trained(folder: Path, base: Any, **changes: Any) -> Any:
    """One step, and how the parameters before it follow from what was generated."""
    trainer = setup.trainer(folder, base=base, max_steps=1, **changes)
    trainer.train()
    return trainer


class Cut(transformers.LlamaForCausalLM):
    """The head's rows are padded, and cut off after it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.logits is not None:
            out.logits = out.logits[..., :-6]
        return out


class Masked(transformers.LlamaForCausalLM):
    """An entry is never sampled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.logits is not None:
            out.logits = out.logits.masked_fill(torch.arange(out.logits.shape[-1]) == 5, -torch.inf)
        return out


class MaskedInTraining(Masked):
    """In training alone, which shows in no forward that generates."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) if self.training else super(Masked, self).forward(*args, **kwargs)


def of_class(kind: type, **changes: Any) -> Any:
    base = setup.model(**changes)
    base.__class__ = kind
    return base


def test_a_vocabulary_that_is_cut_off(tmp_path: Path) -> None:
    """The gradient is that of a model whose head never had the rows."""
    padded = of_class(Cut, vocab_size=len(setup.tokenizer()) + 6)
    whole = setup.model()
    with torch.no_grad():
        for name, p in whole.named_parameters():
            p.copy_(padded.get_parameter(name)[: len(p)])
    got = trained(tmp_path, padded).recorder.gradients[0]
    want = trained(tmp_path, whole).recorder.gradients[0]
    assert float(got["lm_head.weight"][-6:].abs().max()) == 0
    assert setup.cosine({n: g[: len(want[n])] for n, g in got.items()}, want) > 1 - 1e-9


@pytest.mark.parametrize("kind", (Masked, MaskedInTraining))
def test_other_treatments_are_refused_at_construction(tmp_path: Path, kind: type) -> None:
    rollouts = setup.Rollouts()
    base = of_class(kind)
    base.train()
    with pytest.raises(
        ValueError, match=rf"^VCPOTrainer: the head of .*{kind.__name__} applies masked_fill to its logits"
    ):
        setup.trainer(tmp_path, rollouts, base)
    assert not rollouts.calls
    assert base.training


def recorded(tmp_path: Path, base: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step, by the parameter's name, and the parameters themselves."""
    score_norm = options.pop("score_norm", "logit")
    trainer = setup.VCPOTrainer(
        base, setup.reward, setup.arguments(tmp_path, max_steps=1, score_norm=score_norm), setup.dataset(),
        processing_class=setup.tokenizer(), rollout_func=setup.Rollouts(), **options,
    )  # fmt: skip
    recorder = setup.GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    gradients: dict[str, torch.Tensor] = recorder.gradients[0]
    return gradients


def head_alone() -> Any:
    base = setup.model()
    base.requires_grad_(False)
    base.lm_head.weight.requires_grad_(True)
    return base


@pytest.mark.parametrize("score_norm", ["logit", "exact"])
def test_a_head_that_the_adapter_trains(tmp_path: Path, score_norm: str) -> None:
    """modules_to_save=["lm_head"]: its gradient is that of the same head in a model that trains it alone."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    got = recorded(tmp_path, setup.model(), score_norm=score_norm, peft_config=config)
    (gradient,) = (g for n, g in got.items() if "lm_head" in n)
    (want,) = (g for n, g in recorded(tmp_path, head_alone()).items() if "lm_head" in n)
    if score_norm == "logit":
        torch.testing.assert_close(gradient, want, atol=1e-6, rtol=1e-4)
    assert float(gradient.norm()) > 1e-3


def test_lora_on_the_head(tmp_path: Path) -> None:
    """TRL refuses it. logits = h W^T + s (h A^T) B^T with B = 0 at first: d B = s (d W) A^T."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(setup.model(), config)
    down = adapted.get_output_embeddings().lora_A["default"].weight.detach().clone()
    got = recorded(tmp_path, adapted)
    (up,) = (g for n, g in got.items() if "lm_head" in n and "lora_B" in n)
    (whole,) = (g for n, g in recorded(tmp_path, head_alone()).items() if "lm_head" in n)
    torch.testing.assert_close(up, 3 * whole @ down.T, atol=1e-6, rtol=1e-4)
    assert float(up.norm()) > 1e-3


@pytest.mark.parametrize("option", [{"score_norm": "exact"}, {"cast_lm_head_to_fp32": True}], ids=str)
def test_what_lora_on_the_head_excludes_is_refused_at_construction(tmp_path: Path, option: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    rollouts = setup.Rollouts()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"adapter on the head.*modules_to_save"):
        setup.VCPOTrainer(
            setup.model(), setup.reward, setup.arguments(tmp_path, **option), setup.dataset(), rollout_func=rollouts,
            processing_class=setup.tokenizer(), peft_config=config,
        )  # fmt: skip
    assert not rollouts.calls


def test_dora_on_the_head_is_refused_at_construction(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    rollouts = setup.Rollouts()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="head of this model is not supported"):
        setup.VCPOTrainer(
            setup.model(), setup.reward, setup.arguments(tmp_path), setup.dataset(), rollout_func=rollouts,
            processing_class=setup.tokenizer(), peft_config=config,
        )  # fmt: skip
    assert not rollouts.calls
