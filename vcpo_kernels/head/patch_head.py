"""patch_head: a Hugging Face causal LM whose forward hands over hidden states and head weight instead of logits.

Layer: rows. Nothing of transformers is imported. The head's forward is replaced by one that remembers its input and
returns `TracedLogits`, which note what the model does to its logits afterwards (softcap, scale, a bias, a slice); that is then
done in the kernels. Anything else is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.head import deferred
from vcpo_kernels.head.linear_token_stats import linear_token_stats
from vcpo_kernels.head.linear_weighted_logp import linear_weighted_logp
from vcpo_kernels.head.sharded_head import CalledHead, Operands, ShardedHead, Work, asking
from vcpo_kernels.head.traced_logits import TracedLogits
from vcpo_kernels.parallel import tensor_parallel
from vcpo_kernels.rows.token_stats import TokenStats

# What configurations call the numbers that logits are multiplied with or divided by: final_logit_softcapping (Gemma),
# logits_soft_cap (RecurrentGemma), logit_scale (Cohere), lm_head_multiplier (Falcon-H1), output_multiplier, logits_scaling.
FACTOR_NAMES = re.compile("logit|soft_?cap|lm_head|output_multiplier|output_scale")


@dataclass(frozen=True)
class HeadOutput:
    """What a patched model returns: logits = softcap(scale * (hidden @ weight.T + bias)), not yet computed.

    hidden: [.., H], what the head was given (a model's `logits_to_keep` is honoured). weight: [V, H]. bias: [V] or None. Under
    tensor parallelism all three are DTensors, of which the methods take this rank's part.
    softcap: c of c tanh(z / c), or None. model_output: the model's own output (cache, router losses, hidden states),
    with `logits` None. Where FSDP2 or ZeRO-3 shards the head, weight and bias are None: the methods gather them, on all
    ranks.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float
    model_output: Any
    # Empty views of weight and bias. DistributedDataParallel follows outputs back to the parameters they were made with, to
    # find the unused ones, and has no way back from a parameter itself.
    _used: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    _sharded: ShardedHead | CalledHead | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self._sharded is not None:  # what FSDP2's output_dtype made of it would take a whole weight of that dtype
            object.__setattr__(self, "hidden", self.hidden.to(self._sharded.dtype))
        own = (p for p in (self.weight, self.bias) if isinstance(p, Tensor) and not checks.is_dtensor(p))
        used = tuple(p[:0] for p in own if p.requires_grad)
        object.__setattr__(self, "_used", used)

    @property
    def logits(self) -> Tensor:
        raise AttributeError(
            "this model's head is patched (vcpo_kernels.patch_head), so that there are no logits: use .token_stats(...), "
            ".weighted_logp(...), or leave the `with patch_head(model)` block first."
        )

    def token_stats(
        self,
        token_ids: Tensor,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        shift: bool = True,
        **options: Any,
    ) -> TokenStats:
        """`token_stats(model(..).logits, token_ids, mask, temperature, shift=shift)`. options: see linear_token_stats."""
        scaling = self._scaling(Check("token_stats"), temperature)
        made: list[TokenStats] = []

        def work(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            stats = linear_token_stats(hidden, weight, token_ids, bias, mask, **scaling, shift=shift, **options)
            made.append(stats)
            return stats.logp, stats.entropy

        logp, entropy = self._run(work)
        return dataclasses.replace(made[0], logp=logp, entropy=entropy)

    def weighted_logp(
        self,
        token_ids: Tensor,
        coefficients: Tensor,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        shift: bool = True,
        **options: Any,
    ) -> tuple[Tensor, TokenStats]:
        """`weighted_logp(model(..).logits, token_ids, coefficients, ..)`. options: see linear_weighted_logp."""
        scaling = self._scaling(Check("weighted_logp"), temperature)
        made: list[TokenStats] = []

        def work(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            loss, stats = linear_weighted_logp(
                hidden, weight, token_ids, coefficients, bias, mask, **scaling, shift=shift, **options
            )
            made.append(stats)
            return (loss,)

        (loss,) = self._run(work)
        return loss, made[0]

    def in_float32(self) -> HeadOutput:
        """The same in float32, as a head of `hidden.float()`."""
        sharded = None if self._sharded is None else self._sharded.of(torch.float32)
        return dataclasses.replace(self, hidden=self.hidden.float(), _sharded=sharded)

    def _run(self, work: Work) -> tuple[Tensor, ...]:
        if self._sharded is not None:
            return self._sharded.run(self.hidden, work)
        assert self.weight is not None
        return work(self.hidden, self.weight, self.bias)

    def _scaling(self, check: Check, temperature: float) -> dict[str, Any]:
        """c tanh(s z / c) = s (c / s) tanh(z / (c / s)): the scale goes into softcap and temperature."""
        number = check.positive_float("temperature", temperature)
        assert number is not None
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": number / self.scale, "softcap": softcap}


def _parts(out: HeadOutput) -> tuple[list[Any], Any]:
    return [out.hidden, out.weight, out.bias, out.model_output], (out.softcap, out.scale, out._sharded)


def _rebuilt(parts: Iterable[Any], context: Any) -> HeadOutput:
    hidden, weight, bias, model_output = parts
    softcap, scale, sharded = context
    return HeadOutput(hidden, weight, bias, softcap, scale, model_output, _sharded=sharded)


pytree.register_pytree_node(HeadOutput, _parts, _rebuilt)  # FSDP and DDP map over a module's outputs


Parameter = Callable[[], Any]


class _Linear(TorchFunctionMode):
    """Inside it, the first F.linear is answered by `answer(hidden, weight, bias)`, and what adds to its output by `adapt`."""

    def __init__(self, answer: Any, adapt: Any) -> None:
        super().__init__()
        self._answer, self._adapt = answer, adapt
        self._entries = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not functional.linear:
            return function(*args, **kwargs)
        if not self._entries:
            logits = self._answer(*args, **kwargs)
            self._entries = logits.shape[-1]
            return logits
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        return (self._adapt if len(weight) == self._entries else function)(*args, **kwargs)


class PatchedHead:
    """A patch in force. `restore()` ends it; so does leaving the `with` block."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._model, self._head = model, head
        self._calls: list[tuple[Parameter, Parameter]] = []
        self._original, self._head_forward = model.forward, head.forward
        # A head of another class, or with a forward of its own, ends in F.linear too; what it does besides is traced.
        self._style = tensor_parallel.style_of(head)
        self._plain = _is_plain(head) and tensor_parallel.forward_inside(head) is None

        @functools.wraps(self._original)  # trainers read a forward's signature
        def forward(*args: Any, **kwargs: Any) -> HeadOutput:
            return self._forward(*args, **kwargs)

        def generate(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("generate() needs logits, and this model's head is patched: leave patch_head first.")

        replacements = [(head, "forward", self._remember), (model, "forward", forward), (model, "generate", generate)]
        # An instance may already carry a method of its own (Accelerate's autocast): it is wrapped, and put back.
        self._own = [(module, name, module.__dict__.get(name)) for module, name, _ in replacements]
        for module, name, replacement in replacements:
            module.__dict__[name] = replacement
        model.__dict__["_vcpo_patched_head"] = self

    def restore(self) -> None:
        """Put the model's own forward back. A second call does nothing."""
        if self._model.__dict__.get("_vcpo_patched_head") is not self:
            return
        del self._model.__dict__["_vcpo_patched_head"]
        for module, name, own in self._own:
            if own is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = own

    def __enter__(self) -> PatchedHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _remember(self, *args: Any, **kwargs: Any) -> Any:
        if self._plain:
            return self._of_plain(*args, **kwargs)
        with _Linear(self._traced, self._adapted):
            return self._head_forward(*args, **kwargs)

    def _of_plain(self, input: Tensor) -> TracedLogits:
        head: Any = self._head
        if checks.is_dtensor(head.weight) and self._style is not None:
            input = tensor_parallel.on_all_ranks(input, head.weight.device_mesh)  # as the style's own forward has it
        return self._traced(input, head.weight, head.bias)

    def _traced(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> TracedLogits:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        logits = TracedLogits(type(self._model).__name__, input, weight, bias, dtype, declared_factors(self._model))
        self._calls.append((self._parameter(weight), self._parameter(bias)))
        return logits

    def _adapted(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> TracedLogits:
        """The up-projection of LoRA on the head: logits of a low-rank head, to be scaled and added."""
        if deferred.active:
            raise RuntimeError(
                f"patch_head: {_class_name(self._head)} adds to the head's logits, and SequenceGradients has no rule for that. "
                "Use token_stats on the model's logits, or leave the head out of the adapter's target modules."
            )
        if bias is not None:
            raise RuntimeError(f"patch_head: {_class_name(self._head)} has a bias of its own, wanted lora_bias=False.")
        return TracedLogits.adapter(type(self._model).__name__, input, weight)

    def _operands(self, logits: TracedLogits, parameters: tuple[Parameter, Parameter]) -> Operands:
        """The weight and bias that these logits are made with."""
        own = [parameter() for parameter in parameters]
        if checks.is_dtensor(own[0]):
            return logits.of_shared_head(*own)
        Check("patch_head").plain("the head's weight", own[0])
        used = logits.of_head(*own)
        deferral = deferred.deferral_of(*own)
        for mine, its in zip(own, used, strict=True):
            if deferral is not None and mine is not None and mine is not its and deferral.defers(mine):
                raise RuntimeError(
                    f"patch_head: {type(self._model).__name__} uses a part of its head, or adds to its bias, and "
                    "SequenceGradients has no rule for that. Use token_stats on the model's logits."
                )
        return used

    def _parameter(self, given: Tensor | None) -> Parameter:
        """How to ask for it after the forward, during which SequenceGradients has stand-ins in the parameters' places."""
        for module in self._head.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter is given:
                    return functools.partial(getattr, module, name)
        if given is not None and deferred.active and not self._plain:
            raise RuntimeError(
                f"patch_head: the head {_class_name(self._head)} makes its weight anew in each forward, whose gradients "
                "SequenceGradients cannot tell apart. Use token_stats on the model's logits."
            )
        return lambda: given

    def _forward(self, *args: Any, **kwargs: Any) -> HeadOutput:
        name = type(self._model).__name__
        if kwargs.get("labels") is not None:
            raise ValueError(
                f"{name}.forward: labels make the model compute its own loss from logits, of which a patched head has "
                "none. Leave labels out and use .token_stats(token_ids, mask) of the output."
            )
        self._calls.clear()
        try:
            output = self._original(*args, **kwargs)
            logits = getattr(output, "logits", None)
            if len(self._calls) != 1 or not isinstance(logits, TracedLogits):
                raise RuntimeError(
                    f"patch_head: {name} called its head {len(self._calls)} times and returned {type(output).__name__}; "
                    "wanted one call and an output with .logits. Pass return_dict=True, and leave generate() and "
                    "return_dict=False outside the patch."
                )
            output.logits = None
            return self._output(logits, output)
        finally:
            self._calls.clear()

    def _output(self, logits: TracedLogits, output: Any) -> HeadOutput:
        factors, operands = logits.softcap_and_scale(), functools.partial(self._operands, logits, self._calls[0])
        if CalledHead.gathers(self._head):
            called = CalledHead(self._head, operands, logits.hidden.dtype)
            return HeadOutput(logits.hidden, None, None, *factors, output, _sharded=called)
        units = ShardedHead.units_of(self._model, self._head)
        if not units:
            return HeadOutput(logits.hidden, *operands(), *factors, output)
        sharded = ShardedHead(self._head, units, operands, logits.hidden.dtype)
        hidden = asking(logits.hidden, units, *self._head.parameters())
        sharded.gather_in_backward_of(hidden)  # a unit may hold the modules before the head too
        return HeadOutput(hidden, None, None, *factors, output, _sharded=sharded)


def patch_head(model: nn.Module) -> PatchedHead:
    """Make a causal LM's forward return a `HeadOutput` (hidden states and head weight) instead of logits.

    While patched, no [.., V] tensor exists but the chunks that `HeadOutput.token_stats` and `.weighted_logp` work on.
    What the model does to its logits after the head is noted in each forward and done there: softcaps and scales that its
    config names, factors that are tensors of one number, an added [V] bias (Bart), a vocabulary that is cut off. Works
    with any model whose head is the nn.Linear of `model.get_output_embeddings()`: Hugging Face's causal LMs, PEFT models
    around them (with `modules_to_save`, `trainable_token_indices` or plain LoRA on the head too), your own. LoRA on the head
    costs what a trained head does: the gradient is that of both side by side, [V, H + r].

    Use it as a context manager, or keep the result and call `.restore()`.

    Raises:
        TypeError: the head is no plain nn.Linear (a quantised head computes something else); or its weight is a part of itself
            and not FSDP2's or ZeRO-3's, which is gathered wherever the head was put, nor a DTensor.
        ValueError: the model is patched already; or, in its forward, `labels` were given.
        RuntimeError: in the forward, where the model does something else to its logits, by name; or its weight is a DTensor
            that tensor parallelism (ColwiseParallel, transformers' `tp_plan`) has not split by its rows.

    >>> import torch, vcpo_kernels as vk
    >>> from types import SimpleNamespace
    >>> class Tiny(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5)
    ...     def get_output_embeddings(self):
    ...         return self.head
    ...     def forward(self, ids):
    ...         return SimpleNamespace(logits=self.head(self.table(ids)))
    >>> model, ids = Tiny(), torch.tensor([[1, 2, 3]])
    >>> with vk.patch_head(model):
    ...     stats = model(ids).token_stats(ids)
    >>> torch.testing.assert_close(stats.logp, vk.token_stats(model(ids).logits, ids, shift=True).logp)
    """
    check = Check("patch_head")
    if not isinstance(model, nn.Module):
        raise check.type_error(f"model must be an nn.Module, got {checks.describe(model)}.")
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        raise check.type_error(
            f"{type(model).__name__} has no head: model.get_output_embeddings() must return its nn.Linear. "
            "For a wrapped model (DDP, FSDP) patch the model inside."
        )
    for part in _heads(head):
        if not _is_plain(part):
            raise check.type_error(
                f"the head is a {_class_name(part)}, wanted a plain nn.Linear. "
                "Leave the head out of quantisation or of the adapter's target modules, or merge the adapter first."
            )
        weight = part._parameters.get("weight")
        if weight is not None and not checks.is_sharded(weight):  # a sharded one is gathered for the forward
            check.plain("the head's weight", weight)
    if "_vcpo_patched_head" in model.__dict__ or isinstance(
        getattr(head.__dict__.get("forward"), "__self__", None), PatchedHead
    ):
        raise check.value_error(f"{type(model).__name__} is patched already. Call .restore() on that patch first.")
    return PatchedHead(model, head)


def _heads(head: nn.Module) -> list[nn.Module]:
    """The modules that may be called for the head: itself, or what PEFT has put in its place beside what was there.

    PEFT's wrappers of whole modules (modules_to_save, trainable_token_indices) call one of these, or F.linear with a weight
    of their own. Its LoRA layers add to what their base layer returns.
    """
    whole = getattr(head, "original_module", None)
    if isinstance(whole, nn.Module):
        return [whole, *getattr(head, "modules_to_save", nn.ModuleDict()).values()]
    base = getattr(head, "base_layer", None)
    return [base if isinstance(base, nn.Module) else head]


def _is_plain(head: nn.Module) -> bool:
    return type(head).forward is nn.Linear.forward


def _class_name(head: nn.Module) -> str:
    return f"{type(head).__module__}.{type(head).__qualname__}"


def declared_factors(model: nn.Module) -> list[float]:
    """The numbers in a model's config, and in its text model's, that are named as factors of logits are."""
    config: Any = getattr(model, "config", None)
    texts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    found = {
        float(value)
        for text in texts
        for name, value in getattr(text, "__dict__", {}).items()
        if FACTOR_NAMES.search(name) and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    }
    return sorted(found)
