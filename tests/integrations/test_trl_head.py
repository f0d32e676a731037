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


@pytest.mark.parametrize("score_norm", ["logit", "exact"])
def test_a_head_that_the_adapter_trains(tmp_path: Path, score_norm: str) -> None:
    """modules_to_save=["lm_head"]: its gradient is that of the same head in a model that trains it alone."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    gradients = []
    for adapted in (True, False):
        base = setup.model()
        options: dict[str, Any] = {}
        if adapted:
            options["peft_config"] = peft.LoraConfig(
                r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
            )
        else:
            base.requires_grad_(False)
            base.lm_head.weight.requires_grad_(True)
        trainer = setup.VCPOTrainer(
            base, setup.reward, setup.arguments(tmp_path, max_steps=1, score_norm="logit" if not adapted else score_norm),
            setup.dataset(), processing_class=setup.tokenizer(), rollout_func=setup.Rollouts(), **options,
        )  # fmt: skip
        recorder = setup.GradientRecorder()
        trainer.add_callback(recorder)
        trainer.train()
        (gradient,) = (g for n, g in recorder.gradients[0].items() if "lm_head" in n)
        gradients.append(gradient)
    if score_norm == "logit":
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    assert float(gradients[0].norm()) > 1e-3


def test_lora_on_the_head_is_refused_at_construction(tmp_path: Path) -> None:
    """TRL says so itself; the trainer must not have generated before it does."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    rollouts = setup.Rollouts()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        setup.VCPOTrainer(
            setup.model(), setup.reward, setup.arguments(tmp_path), setup.dataset(), processing_class=setup.tokenizer(),
            rollout_func=rollouts, peft_config=config,
        )  # fmt: skip
    assert not rollouts.calls
