"""SequenceGradients on real architectures (tiny, from configurations): Hugging Face models, LoRA, packed rows, DDP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk

pytest.importorskip("transformers", reason="these are Hugging Face models: pip install transformers")
from tests.head import tiny_models
from tests.sequence_gradients.models import assert_gradients, assert_norms, oracle

BATCH, LENGTH = 3, 11
MODELS = ("llama", "llama, tied", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi", "cohere", "granite")


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, a right-padded attention mask (left-padded rows are NaN in these models' float64), and the response's mask."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (BATCH, LENGTH))
    attention = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    attention[1, 8:] = 0
    return ids, attention, (torch.arange(LENGTH) >= 5) & (attention == 1)


def check(model: nn.Module, scalars_of: object, seg: vk.Segments, exactly_as: object = None) -> None:
    """Norms and a weighted gradient of scalars_of(model), against the float64 oracle of `exactly_as` (default: the same)."""
    want = oracle(model, exactly_as or scalars_of, seg.num_sequences)
    c = torch.randn(seg.num_sequences)
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars_of(model), seg)  # type: ignore[operator]
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


@pytest.mark.parametrize("head", ("logits", "fast", "lean"))
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_models(name: str, head: str) -> None:
    """GPT-2's position embeddings and Conv1D, Gemma's norms and scaled embeddings, q/k norms, biases, softcaps, tied heads."""
    model = tiny_models.make(name)
    ids, attention, mask = batch()
    seg = vk.Segments.padded(mask)

    def from_logits(m: nn.Module) -> Tensor:
        return seg.sum(vk.token_stats(m(ids, attention_mask=attention).logits, ids, mask, shift=True).logp)

    def fused(m: nn.Module) -> Tensor:
        with vk.patch_head(m):
            return seg.sum(m(ids, attention_mask=attention).token_stats(ids, mask, memory=head, chunk_bytes=3000).logp)

    check(model, from_logits if head == "logits" else fused, seg, exactly_as=from_logits)


def test_a_head_patched_before() -> None:
    """As a training loop has it that patches once: the head's own forward is away when the context is made."""
    model = tiny_models.make("llama, tied")
    ids, attention, mask = batch()
    seg = vk.Segments.padded(mask)
    want = oracle(
        model,
        lambda m: seg.sum(vk.token_stats(m(ids, attention_mask=attention).logits, ids, mask, shift=True).logp),
        BATCH,
    )
    with vk.patch_head(model), vk.SequenceGradients(model) as grads:
        grads.backward(seg.sum(model(ids, attention_mask=attention).token_stats(ids, mask).logp), seg)
        assert_norms(grads.squared_norms(), want.norms)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny_models.make("llama, tied")
    ids, attention, mask = batch()
    seg = vk.Segments.padded(mask)

    def scalars(m: nn.Module) -> Tensor:
        return seg.sum(vk.token_stats(m(ids, attention_mask=attention).logits, ids, mask, shift=True).logp)

    want = oracle(model, scalars, BATCH)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    c = torch.randn(BATCH)
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


def test_packed_rows_with_block_attention() -> None:
    """Three sequences end to end, each attending to itself alone."""
    model = tiny_models.make("qwen2")
    lengths = [4, 7, 5]
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, sum(lengths)))
    cu = torch.tensor([0, 4, 11, 16])
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    allowed = (owner[:, None] == owner) & torch.ones(16, 16, dtype=torch.bool).tril()
    seg = vk.Segments.packed(cu, vk.Segments.packed(cu).mask_without_first(16))

    def scalars(m: nn.Module) -> Tensor:
        blocked = torch.zeros(1, 1, 16, 16, dtype=next(m.parameters()).dtype).masked_fill(~allowed, -1e9)
        logits = m(ids, attention_mask=blocked, position_ids=positions).logits
        return seg.sum(vk.token_stats(logits, ids, seg.mask[None], shift=True).logp)

    check(model, scalars, seg)


EXPERTS = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    },
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "JetMoeForCausalLM": {"num_local_experts": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures_of_experts(name: str) -> None:
    """Experts that train have no rule; frozen, the rest is exact, token by token as routing is. A load-balancing loss is of the
    whole batch: refused.
    """
    model = tiny_models.with_experts(name, EXPERTS[name])
    with pytest.raises(ValueError, match=r"(?s)Experts.*no rule for this kind of module.*requires_grad_\(False\)"):
        vk.SequenceGradients(model)
    for module in model.modules():
        if re.search(r"Experts$|Router$|MoE$|MoA$", type(module).__name__):
            for p in module.parameters(recurse=False):
                p.requires_grad_(False)
    ids, attention, mask = batch()
    seg = vk.Segments.padded(mask)

    def scalars(m: nn.Module, balance: bool = False) -> Tensor:
        out = m(ids, attention_mask=attention, output_router_logits=balance)
        logp = seg.sum(vk.token_stats(out.logits, ids, mask, shift=True).logp)
        return logp + 0.01 * out.aux_loss if balance else logp

    check(model, scalars, seg)
    with vk.SequenceGradients(model) as grads, pytest.raises(RuntimeError, match="a mean over the batch"):
        grads.backward(scalars(model, balance=True), seg)


@pytest.mark.parametrize("head", ("logits", "fused"))
def test_lora(head: str) -> None:
    """Adapters alone train; the frozen model beside them is left as it is."""
    peft = pytest.importorskip("peft", reason="LoRA comes from peft: pip install peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(tiny_models.make("llama"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    ids, attention, mask = batch()
    seg = vk.Segments.padded(mask)

    def scalars(m: nn.Module) -> Tensor:
        if head == "logits" or next(m.parameters()).dtype == torch.float64:
            return seg.sum(vk.token_stats(m(ids, attention_mask=attention).logits, ids, mask, shift=True).logp)
        with vk.patch_head(m):
            return seg.sum(m(ids, attention_mask=attention).token_stats(ids, mask).logp)

    check(model, scalars, seg)


DDP = """
import os, sys, torch, torch.distributed as dist
import vcpo_kernels as vk
from tests.sequence_gradients.models import token_model, VOCABULARY

rank = int(sys.argv[1])
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(1)
ids, c = torch.randint(1, VOCABULARY, (2, 2, 3, 5)), torch.randn(2, 2, 3)  # [rank, micro-batch, B, T]
seg = vk.Segments.padded(torch.ones(3, 5))
reference = token_model()
for r in range(2):
    for m in range(2):
        logp = seg.sum(vk.token_stats(reference(ids[r, m]), ids[r, m], shift=True).logp)
        (-(logp * c[r, m]).sum() / 2).backward()
model = torch.nn.parallel.DistributedDataParallel(token_model())
reductions = []
reduce = dist.all_reduce
dist.all_reduce = lambda *a, **k: reductions.append(1) or reduce(*a, **k)

def step(m):
    with vk.SequenceGradients(model) as grads:
        grads.backward(seg.sum(vk.token_stats(model(ids[rank, m]), ids[rank, m], shift=True).logp), seg)
        assert grads.squared_norms().shape == (3,)
        grads.accumulate_(c[rank, m])

with model.no_sync():
    step(0)
assert not reductions
step(1)
assert len(reductions) == 1, reductions
for p, q in zip(model.module.parameters(), reference.parameters()):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
model.zero_grad()
out = model(ids[rank, 0])  # DDP's own way still works afterwards
vk.token_stats(out, ids[rank, 0], shift=True).logp.sum().backward()
print("ok", rank)
dist.destroy_process_group()
"""


def test_ddp_averages_once(tmp_path: Path) -> None:
    """Two gloo ranks, two micro-batches of which the first is under no_sync: one reduction, the mean of all four."""
    script = tmp_path / "ranks.py"
    script.write_text(DDP)
    command = [sys.executable, str(script)]
    root = Path(__file__).resolve().parent.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=root, env=environment, **pipes)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    for number, output in enumerate(outputs):
        assert f"ok {number}" in output, output
