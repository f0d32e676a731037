"""The methods as functions: hyperparameters and the terms of a call in one argument list."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from inspect import Parameter
from typing import Any, get_type_hints

from torch import Tensor

from vcpo_kernels.objectives import clipped, masked, sequence_level, soft, weighted
from vcpo_kernels.objectives.common import DEFAULTS, CommonTerms, ObjectiveTerms
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.segments import Segments


@functools.cache
def as_function(method: type[TokenObjective]) -> Callable[..., ObjectiveOutput]:
    """`method(**hyperparameters)(stats, ..., **terms)` as one call, under the method's name. All must have defaults."""
    value = method()

    def function(
        stats: TokenStats, behavior_logp: Tensor, advantages: Tensor, segments: Segments, **keywords: Any
    ) -> ObjectiveOutput:
        return value.with_keywords(stats, behavior_logp, advantages, segments, **keywords)

    function.__name__ = function.__qualname__ = method.name
    _, title, arguments = (inspect.getdoc(TokenObjective.__call__) or "").partition("Args:")
    function.__doc__ = f"{inspect.getdoc(method)}\n\n{title}{arguments}"
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        list(_parameters(value)), return_annotation=ObjectiveOutput
    )
    return function


def _parameters(value: TokenObjective) -> Iterator[Parameter]:
    batch = {"stats": TokenStats, "behavior_logp": Tensor, "advantages": Tensor, "segments": Segments}
    for name, kind in batch.items():
        yield Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
    defaults = {f.name: getattr(value, f.name) for f in fields(value)}
    defaults["aggregation"] = defaults.pop("aggregation")  # the one that all have comes last
    terms = (*value.proximal_terms, *CommonTerms.__annotations__)
    defaults |= {name: DEFAULTS.get(name) for name in terms}
    kinds = get_type_hints(ObjectiveTerms) | get_type_hints(type(value))
    for name, default in defaults.items():
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])


cispo = as_function(clipped.CISPO)
dppo_tv = as_function(masked.DPPOTV)
gmpo = as_function(sequence_level.GMPO)
gspo = as_function(sequence_level.GSPO)
gspo_token = as_function(sequence_level.GSPOToken)
icepop = as_function(masked.IcePop)
m2po = as_function(masked.M2PO)
opsm = as_function(masked.OPSM)
ppo_clip = as_function(clipped.PPOClip)
reinforce = as_function(weighted.Reinforce)
sapo = as_function(soft.SAPO)
sequence_masked_is = as_function(weighted.SequenceMaskedIS)
sequence_truncated_is = as_function(weighted.SequenceTruncatedIS)
token_masked_is = as_function(weighted.TokenMaskedIS)
token_truncated_is = as_function(weighted.TokenTruncatedIS)
topr = as_function(weighted.TOPR)
vespo = as_function(soft.VESPO)
