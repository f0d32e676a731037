"""SequenceGradients: every sequence's exact gradient norm and the weighted gradient, from one forward and one backward.

Layer: sequences [B]. The update sum_i c_i grad log pi(y_i) is linear in the sequences, and c_i enters the weight gradients
alone. So the backward forms activation gradients only; every module leaves its input and output gradient (`capture.py`);
norms are taken from those (`norms.py`), the baseline and c from the norms, and only then the weights' gradients.
"""

from __future__ import annotations

import contextlib
import math
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.head import deferred as _deferred
from vcpo_kernels.parallel import tensor_parallel
from vcpo_kernels.parallel.averaging import average_gradients
from vcpo_kernels.parallel.ranks import size_of
from vcpo_kernels.sequence_gradients import local_factors, ownership
from vcpo_kernels.sequence_gradients.capture import Capture
from vcpo_kernels.sequence_gradients.factors import ParameterGradient, Product
from vcpo_kernels.sequence_gradients.graph import Graph, graph_of
from vcpo_kernels.sequence_gradients.head import DeferredHead, HeadUse
from vcpo_kernels.sequence_gradients.model_checks import check_hooks, check_logits, check_model, rules_of
from vcpo_kernels.sequence_gradients.norms import squared_norms
from vcpo_kernels.sequence_gradients.over_sequence_ranks import squared_norms_over
from vcpo_kernels.sequence_gradients.parameters import Parameters
from vcpo_kernels.sequence_gradients.row_owners import RowOwners
from vcpo_kernels.sequences.segments import Segments, check_segments

WHERE = "SequenceGradients"
CHECK = Check(WHERE)


class _Batch(NamedTuple):
    """What one backward left. sequence_group: of ranks that have other tokens of its sequences."""

    sequences: int
    gradients: dict[Tensor, ParameterGradient]
    sequence_group: Any


class SequenceGradients:
    """A context in which a model's backward leaves each sequence's gradient apart, for exact norms and any weighted sum.

    Costs the GEMMs of a plain step and the norms'. Kept until `accumulate_`: every captured module's output gradient, beside
    the inputs that a plain forward keeps too. No buffer of the parameters' size, whatever B is.

    Exact where a row of activations matters to its own sequence alone: padded and packed batches of causal LMs, without
    batch statistics. A probe sees to that (`check`), and what is not so is an error. Handles Linear, Embedding, LayerNorm,
    RMSNorm (any library's), transformers' Conv1D, what PEFT's LoRA makes of them, tied weights, `linear_token_stats` on the
    model's head (so `patch_head` too), activation checkpointing, autocast, and DistributedDataParallel and FSDP2 (HSDP too),
    whose gradients are averaged once, by `accumulate_`. Under FSDP2 every method is a call that all ranks make, norms are of
    this rank's sequences, and one parameter's whole gradient exists at a time. A fused head wants the hidden states whole
    (`shift=True`), so that its rows are the batch's.

    Ranks may share sequences too, and then make every call. Under tensor parallelism (`parallelize_module`, transformers'
    `tp_plan`, with FSDP2 or without) squared norms add over a parameter's parts. With segments of a `sequence_group`, whose
    ranks have other tokens, norms are of whole sequences, and `accumulate_` leaves this rank's share of the gradient, to be
    summed over that group (docs/parallel.md).

    >>> import torch, vcpo_kernels as vk
    >>> model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
    >>> ids, rewards = torch.randint(0, 7, (4, 5)), torch.tensor([1.0, 0.0, 0.0, 1.0])
    >>> seg = vk.Segments.padded(torch.ones(4, 5))
    >>> with vk.SequenceGradients(model) as grads:
    ...     stats = vk.token_stats(model(ids), ids, shift=True)
    ...     grads.backward(seg.sum(stats.logp), seg)  # activation gradients only
    ...     config = vk.VCPOConfig(score_norm=grads.squared_norms())  # [4], exact
    ...     out = vk.vcpo_loss(stats, stats.logp.detach(), rewards, 2, seg, config)
    ...     grads.accumulate_(out.coefficients)  # param.grad += -sum_i c_i grad log pi(y_i)
    >>> model[1].weight.grad.shape
    torch.Size([7, 4])

    Args:
        model: the module that is called inside the context; its parameters that require gradients are all treated.
        check: when `backward` runs the probe: "auto", "always", or "never" (shapes are believed). It is one more backward of
            activation gradients (two past 32 sequences) and costs a third of a step. "auto" runs it once for a model and the
            graph of its forward, and each time where data decides whose rows are where: packed and indexed batches,
            indexing and sorting in the model, losses over the whole batch, Functions that are not known (fused kernels of
            other libraries, checkpointing with use_reentrant=True).

    Raises:
        TypeError: model is no module, is compiled, or its parameters are replicated by a module inside, or sharded by others
            than FSDP2 and tensor parallelism (FSDP1, ZeRO-3, CPU offload), or in a way that no rule is known for.
        ValueError: a module with trainable parameters that no rule covers, by its name. `OPOBAccumulator` takes any, whole.
    """

    def __init__(self, model: nn.Module, check: str = "auto") -> None:
        if not isinstance(model, nn.Module):
            raise CHECK.type_error(f"model must be an nn.Module, got {checks.describe(model)}.")
        self._ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self._model: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._parameters = Parameters(self._model)
        check_model(CHECK, self._model)
        self._parameters.find_parts(CHECK)
        CHECK.choice("check", check, ownership.CHECKS)
        self._check = check
        self._names = self._parameters.names
        self._rules = rules_of(CHECK, self._model)
        self._exits, self._averages = contextlib.ExitStack(), False
        self._reset()

    def _reset(self) -> None:
        self._batch_shape: tuple[int, ...] | None = None
        self._owners: RowOwners | None = None
        self._gradients: dict[Tensor, ParameterGradient] = {}
        self._probe: ownership.Probe | None = None
        self._batches: list[_Batch] = []

    # --- the context -------------------------------------------------------------------------------------------------

    def __enter__(self) -> SequenceGradients:
        if self in _deferred.active:
            raise RuntimeError(f"{WHERE}: this context is entered already.")
        if any(other.defers(p) for other in _deferred.active for p in self._names):
            raise RuntimeError(f"{WHERE}: another SequenceGradients of the same parameters is active. Leave it first.")
        if not self._parameters.are_those_of(self._model):
            raise RuntimeError(
                f"{WHERE}: since it was made, parameters of the model were frozen, unfrozen or replaced. Make a new one."
            )
        with contextlib.ExitStack() as exits:
            exits.enter_context(tensor_parallel.without_sums(self._names))
            check_hooks(CHECK, self._names)
            self._averages = self._ddp is not None and bool(self._ddp.require_backward_grad_sync)
            if self._ddp is not None:
                exits.enter_context(self._ddp.no_sync())
            hooks = [self._model.register_forward_pre_hook(self._see_batch, with_kwargs=True)]
            for module, name, rule, deferred in self._rules:
                capture = Capture(module, name, rule, deferred, self._record, self._meet, lambda: self._batch_shape)
                hooks += capture.install()
            hooks += [p.register_hook(self._refuse_gradient(name)) for p, name in self._names.items()]
            for hook in hooks:
                exits.callback(hook.remove)
            _deferred.active.append(self)
            exits.callback(_deferred.active.remove, self)
            exits.callback(self._parameters.forget_stand_ins)
            exits.callback(self._parameters.release_heads)
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()
        self._reset()

    # --- public ------------------------------------------------------------------------------------------------------

    def backward(self, per_sequence: Tensor, segments: Segments) -> None:
        """Backpropagate one scalar per sequence, activation gradients only.

        Several calls before `accumulate_` (micro-batches) append their sequences to each other.

        Args:
            per_sequence: [B], each entry a function of its own sequence: `segments.sum(stats.logp)` for log pi(y_i).
            segments: the sequences of the batch that the model was called with, whole, or with a `sequence_group` this rank's
                part of them: whose row is whose is read off it, the mask is not.

        Raises:
            TypeError, ValueError: naming the argument. RuntimeError: a module whose rows cannot be told apart by sequence, or
            carry gradients of other sequences' scalars, tokens of no sequence that take a gradient, or a parameter that
            was used outside its own module's forward, or outside the model.
        """
        check = Check(f"{WHERE}.backward")
        self._check_active(check)
        check_segments(check, segments)
        check.tensor("per_sequence", per_sequence, checks.FLOAT_DTYPES)
        fix = "One scalar per sequence: segments.sum(stats.logp)."
        check.shape("per_sequence", per_sequence, (segments.num_sequences,), "segments.num_sequences", fix)
        if not per_sequence.requires_grad:
            raise check.value_error(
                "per_sequence has no gradient: it must come from a forward inside the context, under grad mode."
            )
        graph = graph_of(per_sequence, max(segments.num_sequences, 1))
        self._check_leaves(check, graph)
        self._owners, self._gradients = RowOwners(segments), {}
        key = ownership.key_of(graph, self._owners)
        try:
            rounds = ownership.rounds(self._check, self._model, key, graph, segments.num_sequences)
            rounds = rounds if self._check == "never" else self._parameters.largest(rounds, segments)
            if rounds:
                self._probe = ownership.Probe.of(graph, per_sequence, rounds)
                self._probe.run_rounds(check, per_sequence, graph)
            per_sequence.sum().backward()
            if self._probe is not None:
                self._probe.raise_if_mixed(check, self._parameters.groups(segments))
                ownership.remember(self._model, key)
            self._batches.append(_Batch(segments.num_sequences, self._gradients, segments.sequence_group))
        finally:
            self._owners, self._gradients, self._probe = None, {}, None

    @torch.no_grad()
    def squared_norms(self) -> Tensor:
        """||grad_theta of per_sequence[i]||^2 over all trainable parameters: [B], fp32 (float64 for float64 parameters)."""
        by_parameter = self.squared_norms_by_parameter()
        norms = list(by_parameter.values())
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._names) else torch.float32
        return torch.stack(norms).sum(0).to(dtype)

    @torch.no_grad()
    def squared_norms_by_parameter(self) -> dict[str, Tensor]:
        """The terms of `squared_norms`, [B] float64 each, by the parameters' names in the model."""
        self._check_batches(Check(f"{WHERE}.squared_norms"))
        self._parameters.gather_heads()
        of_batches = [self._norms_of(batch) for batch in self._batches]
        norms = {name: torch.cat([found[name] for found in of_batches]) for name in self._names.values()}
        return self._parameters.over_parts(Check(f"{WHERE}.squared_norms"), norms)

    def _norms_of(self, batch: _Batch) -> dict[str, Tensor]:
        """Of every parameter, on one device, over sequence ranks."""
        if size_of(batch.sequence_group) > 1:
            uses = [(self._parameters.place_of(p), batch.gradients.get(p)) for p in self._parameters]
            return squared_norms_over(batch.sequence_group, batch.sequences, uses)
        device = next(iter(self._names)).device
        found = squared_norms(batch.gradients.values())
        zeros = torch.zeros(batch.sequences, dtype=torch.float64, device=device)
        return {name: found.get(name, zeros).to(device) for name in self._names.values()}

    @torch.no_grad()
    def accumulate_(self, coefficients: Tensor) -> None:
        """param.grad += -sum_i coefficients[i] grad per_sequence[i], and forget the batch.

        With `vcpo_loss`'s coefficients and log pi(y_i) this is the gradient of its loss. Sequences with a coefficient of
        exactly 0 take no part, NaN in their gradients included. Under DistributedDataParallel the gradients are averaged
        over the ranks here, unless inside its `no_sync()`.

        Args:
            coefficients: [B], of all sequences since the last call.

        Raises:
            TypeError, ValueError: naming the argument. RuntimeError: no `backward` came before.
        """
        check = Check(f"{WHERE}.accumulate_")
        self._check_batches(check)
        check.tensor("coefficients", coefficients, checks.FLOAT_DTYPES)
        counts = [batch.sequences for batch in self._batches]
        check.shape("coefficients", coefficients, (sum(counts),), "the sequences since the last accumulate_")
        batches, self._batches = self._batches, []
        shares = [
            (batch.gradients, -part) for batch, part in zip(batches, coefficients.detach().split(counts), strict=True)
        ]
        self._parameters.gather_heads()
        for parameter in self._parameters:  # each one's factors are freed as soon as they are added
            of_it = [(gradients.pop(parameter), c) for gradients, c in shares if parameter in gradients]
            self._parameters.add(parameter, of_it)
        self._parameters.release_heads()
        if self._ddp is not None and self._averages:
            average_gradients(self._names, self._ddp.process_group)

    # --- what captures and the fused head call -----------------------------------------------------------------------

    def defers(self, parameter: Tensor) -> bool:
        return self._parameters.own(parameter) is not None

    def linear_token_stats(self, parameters: tuple[Tensor, Tensor | None], *arguments: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, *rest = arguments
        shard = rest[5]  # after the other operands: token_ids, mask, temperature, softcap, shift
        lead = tuple(hidden.shape[:-1])

        def record(use: HeadUse) -> None:
            self._record_head(parameters, lead, use)

        if shard is not None:
            for own in (self._parameters.own(p) for p in parameters if p is not None):
                if own is not None:
                    self._parameters.note_vocabulary(own, shard.group)
        deferred = [p for p in parameters if p is not None and self.defers(p)]
        detached = None if bias is None else bias.detach()
        outputs: tuple[Tensor, ...] = DeferredHead.apply(record, hidden, weight.detach(), detached, *rest, *deferred)
        return outputs

    def _record(self, capture: Capture, x: Tensor, grad: Tensor) -> None:
        owners, site = self._owners_now(capture.name), capture.name or type(capture.module).__name__
        with torch.no_grad():
            weight = self._parameters.part(capture.module, "weight")
            x, grad = local_factors.laid_out(capture.rule, weight, x, grad)
            if self._probe is not None:
                self._probe.see(site, owners, grad)
                if self._probe.weighs:
                    return
            into = {name: self._gradient_of(self._parameters.at(capture.module, name)) for name in capture.deferred}
            local_factors.record(capture.rule, capture.module, site, owners, x, grad, into, weight)

    def _record_head(self, parameters: tuple[Tensor, Tensor | None], lead: tuple[int, ...], use: HeadUse) -> None:
        site = "linear_token_stats (of hidden states whole, with shift=True)"
        owners = self._owners_now(site)
        owners.rows_per_token(site, lead)
        if self._probe is not None:
            rows = use.upstream.new_zeros(math.prod(lead), use.upstream.shape[1])
            self._probe.see(site, owners, rows.index_copy_(0, use.positions, use.upstream).view(*lead, -1))
            if self._probe.weighs:
                return
        permutation, spans = owners.sort_by_sequence(use.positions)
        owned = int(spans.offsets[-1])
        if owned < len(permutation):
            owners.check_unassigned(site, use.left.selected(permutation[owned:]).block(slice(0, use.left.width)))
        as_they_are = owners.segments.order is None and owned == len(permutation)
        left = use.left if as_they_are else use.left.selected(permutation[:owned])
        for parameter, right in zip(parameters, (use.hidden, use.factors), strict=True):
            own = None if parameter is None else self._parameters.own(parameter)
            if own is not None:
                self._parameters.note_head(own)
                self._gradient_of(own).products.append(Product(left, right[permutation[:owned]], spans))

    def _gradient_of(self, parameter: Tensor) -> ParameterGradient:
        return self._gradients.setdefault(parameter, ParameterGradient(self._names[parameter]))

    def _meet(self, capture: Capture, name: str, found: Tensor) -> None:
        """What stands in a parameter's place when its module is called."""
        if self._parameters.stands_for(found, capture.module, name) and found.requires_grad:
            own = self._parameters.at(capture.module, name)
            self._exits.callback(found.register_hook(self._refuse_gradient(self._names[own])).remove)

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # ids or embeddings; a mask of four dimensions has the heads second
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() in (2, 3))
        self._batch_shape = next((tuple(t.shape[:2]) for t in tensors), None)

    def _refuse_gradient(self, name: str) -> Any:
        def refuse(grad: Tensor | None) -> None:
            if grad is not None:
                raise RuntimeError(
                    f"{WHERE}: parameter {name!r} takes a gradient outside its own module's forward (its tensor is used "
                    "directly), of which nothing is known by sequence. Call the module, use linear_token_stats for a "
                    "head, or, where parameters are whole, use OPOBAccumulator."
                )

        return refuse

    def _owners_now(self, name: str) -> RowOwners:
        if self._owners is None:
            raise RuntimeError(
                f"{WHERE}: {name} was differentiated by a backward of its own. Inside the context call "
                "grads.backward(per_sequence, segments) instead of loss.backward()."
            )
        return self._owners

    def _check_leaves(self, check: Check, graph: Graph) -> None:
        for leaf in graph.leaves:
            if isinstance(leaf, nn.Parameter) and not self.defers(leaf):
                raise check.runtime_error(
                    f"per_sequence depends on a parameter of shape {tuple(leaf.shape)} that is not the model's "
                    "(a value head, a module around it): its gradient would be summed without coefficients. Pass the module "
                    "that holds all of them to SequenceGradients, or freeze it (requires_grad_(False))."
                )
        check_logits(check, self._rules, graph.shard_widths, self._parameters.part)

    def _check_active(self, check: Check) -> None:
        if self not in _deferred.active:
            raise check.runtime_error("call it inside `with SequenceGradients(model) as grads:`.")

    def _check_batches(self, check: Check) -> None:
        self._check_active(check)
        if not self._batches:
            raise check.runtime_error("no batch to work on. Call grads.backward(per_sequence, segments) first.")
