"""Megatron-core on gloo ranks without a GPU: what stands in for one, its process groups, and a tiny GPTModel."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

B, T, H, HEADS, LAYERS = 8, 8, 16, 4, 2
VOCABULARY, DIVISIBLE_BY = 61, 8  # --make-vocab-size-divisible-by


class _CpuForCuda(TorchFunctionMode):
    """Megatron's optimizers and schedules make their tensors on "cuda" by name, and know parameters by type()."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


def _norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> torch.nn.Module:
    """As WrappedTorchNorm, which refuses sequence parallelism since nothing would mark its parameters for Megatron's
    all-reduce of their gradients: this does.
    """
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for p in norm.parameters():
        p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A rank's function, with Megatron's GPU stood in for: tensors made where it says are on the CPU, and the generators of its
    dropout, which is off here, are torch's own.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        torch.cuda.synchronize = lambda *args: None
        CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
        WrappedTorchNorm.__new__ = _norm
        with _CpuForCuda():
            return function(*args)

    return call


@contextlib.contextmanager
def parallel(tensor: int, context: int = 1, pipeline: int = 1) -> Iterator[Any]:
    """Megatron's groups for this many tensor, context and pipeline ranks, the rest data ranks; its `parallel_state`."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, context_parallel_size=context, pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=False,
    )  # fmt: skip
    try:
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()


def padded(tensor: int, size: int = VOCABULARY) -> int:
    """The vocabulary's entries at this many tensor ranks, as Megatron pads them."""
    multiple = DIVISIBLE_BY * tensor
    return -(-size // multiple) * multiple


def config(sequence_parallel: bool = False, **options: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS, hidden_size=H, num_attention_heads=HEADS, ffn_hidden_size=2 * H, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(), pipeline_dtype=torch.float32,
        sequence_parallel=sequence_parallel, masked_softmax_fusion=False, **options,
    )  # fmt: skip


def gpt(sequence_parallel: bool = False, tied: bool = False, **options: Any) -> Any:
    """This rank's part of one model: of every parameter its slice, of pipeline stages its own."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    settings = config(sequence_parallel, **options)
    torch.manual_seed(0)
    return GPTModel(
        settings, get_gpt_layer_local_spec(), vocab_size=padded(settings.tensor_model_parallel_size),
        max_sequence_length=T, parallel_output=True, share_embeddings_and_output_weights=tied,
        position_embedding_type="learned_absolute", pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (B, T + 1))
    mask = torch.rand(B, T) < 0.8
    mask[:, 1] = True
    return {
        "ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "mask": mask, "c": torch.randn(B, T),
        "positions": torch.arange(T).expand(B, T).contiguous(), "rewards": torch.rand(B),
        "mu": torch.randn(B, T) * 0.3 - 4.0,
    }  # fmt: skip


def causal() -> Tensor:
    """True where attention may not look, as Megatron has it."""
    return torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)


def slice_of(whole: Tensor, parameter: Any) -> Tensor:
    """This tensor rank's part of a parameter that one rank has whole."""
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, rank = parameter.partition_dim, parallel_state.get_tensor_model_parallel_rank()
    here = slice(rank * parameter.shape[dim], (rank + 1) * parameter.shape[dim])
    return whole.movedim(dim, 0)[here].movedim(0, dim)
