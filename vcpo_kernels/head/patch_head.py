"""patch_head: a Hugging Face causal LM whose forward hands over hidden states and head weight instead of logits.

Layer: rows. Nothing of transformers is imported. The head's forward is replaced by one that remembers its input and
returns a few known numbers, the probe; what the model makes of the probe shows how it treats its logits afterwards
(softcap, scale), which is then done in the kernels. A treatment that is none of the known ones is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.head.linear_token_stats import linear_token_stats
from vcpo_kernels.head.linear_weighted_logp import linear_weighted_logp
from vcpo_kernels.rows.token_stats import TokenStats

# Where configurations keep what is done to logits: softcap(z) = c tanh(z / c) (Gemma-2 and -3, RecurrentGemma), and factors,
# which one model multiplies by and another divides by (Cohere, Falcon-H1, Granite); the probe tells which.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
PROBE = (0.0, 1.0, -8.0, 64.0)


@dataclass(frozen=True)
class HeadOutput:
    """What a patched model returns: logits = softcap(scale * (hidden @ weight.T + bias)), not yet computed.

    hidden: [.., H], what the head was given (a model's `logits_to_keep` is honoured). weight: [V, H]. bias: [V] or None.
    softcap: c of c tanh(z / c), or None. model_output: the model's own output (cache, router losses, hidden states),
    with `logits` None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    model_output: Any

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
        return linear_token_stats(
            self.hidden, self.weight, token_ids, self.bias, mask, **scaling, shift=shift, **options
        )

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
        return linear_weighted_logp(
            self.hidden, self.weight, token_ids, coefficients, self.bias, mask, **scaling, shift=shift, **options
        )

    def _scaling(self, check: Check, temperature: float) -> dict[str, Any]:
        """c tanh(s z / c) = s (c / s) tanh(z / (c / s)): the scale goes into softcap and temperature."""
        number = check.positive_float("temperature", temperature)
        assert number is not None
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": number / self.scale, "softcap": softcap}


def _parts(out: HeadOutput) -> tuple[list[Any], Any]:
    return [out.hidden, out.weight, out.bias, out.model_output], (out.softcap, out.scale)


def _rebuilt(parts: Iterable[Any], context: Any) -> HeadOutput:
    hidden, weight, bias, model_output = parts
    softcap, scale = context
    return HeadOutput(hidden, weight, bias, softcap, scale, model_output)


pytree.register_pytree_node(HeadOutput, _parts, _rebuilt)  # FSDP and DDP map over a module's outputs


class PatchedHead:
    """A patch in force. `restore()` ends it; so does leaving the `with` block."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        self._model, self._head = model, head
        self._hidden: list[Tensor] = []
        self._treatment: tuple[float | None, float] | None = None
        self._original = model.forward

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

    def _remember(self, hidden: Tensor) -> Tensor:
        self._hidden.append(hidden)
        return hidden.new_tensor(PROBE, dtype=torch.float32).expand(*hidden.shape[:-1], len(PROBE))

    def _forward(self, *args: Any, **kwargs: Any) -> HeadOutput:
        name = type(self._model).__name__
        if kwargs.get("labels") is not None:
            raise ValueError(
                f"{name}.forward: labels make the model compute its own loss from logits, of which a patched head has "
                "none. Leave labels out and use .token_stats(token_ids, mask) of the output."
            )
        self._hidden.clear()
        try:
            output = self._original(*args, **kwargs)
            if len(self._hidden) != 1 or not isinstance(getattr(output, "logits", None), Tensor):
                raise RuntimeError(
                    f"patch_head: {name} called its head {len(self._hidden)} times and returned {type(output).__name__}; "
                    "wanted one call and an output with .logits. Pass return_dict=True, and leave generate() and "
                    "return_dict=False outside the patch."
                )
            if self._treatment is None:
                self._treatment = treatment(self._model, output.logits)
            output.logits = None
            return HeadOutput(self._hidden[0], self._head.weight, self._head.bias, *self._treatment, output)
        finally:
            self._hidden.clear()


def patch_head(model: nn.Module) -> PatchedHead:
    """Make a causal LM's forward return a `HeadOutput` (hidden states and head weight) instead of logits.

    While patched, no [.., V] tensor exists but the chunks that `HeadOutput.token_stats` and `.weighted_logp` work on.
    Softcaps and scales that the model applies to its logits are applied there. Works with any model whose head
    is the nn.Linear of `model.get_output_embeddings()`: Hugging Face's causal LMs, PEFT models around them, your own.

    Use it as a context manager, or keep the result and call `.restore()`.

    Raises:
        TypeError: the head is no plain nn.Linear (a LoRA or quantised head computes something else).
        ValueError: the model is patched already; or, in its forward, `labels` were given.
        RuntimeError: in the first forward, where the model treats its logits in a way that is not known. (On a GPU that
            forward waits for the comparison, once per patch.)

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
    if type(head).forward is not nn.Linear.forward:
        raise check.type_error(
            f"the head is a {type(head).__module__}.{type(head).__qualname__}, wanted a plain nn.Linear. "
            "Leave the head out of the adapter's target modules or of quantisation, or merge the adapter first."
        )
    if "_vcpo_patched_head" in model.__dict__ or isinstance(getattr(head.forward, "__self__", None), PatchedHead):
        raise check.value_error(f"{type(model).__name__} is patched already. Call .restore() on that patch first.")
    return PatchedHead(model, head)


def treatment(model: nn.Module, seen: Tensor) -> tuple[float | None, float]:
    """(softcap, scale) with which the model turned the probe into `seen` [.., len(PROBE)]."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcaps = [float(c) for c in (getattr(config, name, None) for name in SOFTCAPS) if c] + [None]
    factors = [float(s) for s in (getattr(config, name, None) for name in SCALES) if s]
    scales = [candidate for s in factors for candidate in (s, 1 / s)] + [1.0]
    if seen.numel() == 0:  # no token: nothing shows, and nothing will be computed
        return None, 1.0
    got = seen.detach().reshape(-1, seen.shape[-1])[0].double()
    tolerance = 8 * torch.finfo(seen.dtype).eps
    probe = torch.tensor(PROBE, dtype=torch.float64, device=got.device)
    for softcap, scale in itertools.product(softcaps, scales):
        want = scale * probe
        want = want if softcap is None else softcap * torch.tanh(want / softcap)
        if got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=0):
            return softcap, scale
    raise RuntimeError(
        f"patch_head: {type(model).__name__} turns logits {list(PROBE)} into {[round(v, 6) for v in got.tolist()]}, which "
        f"is none of the known softcaps and scales (softcap {softcaps}, scale {scales} by its config). "
        "Use token_stats on its logits."
    )
