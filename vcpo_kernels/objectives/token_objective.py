"""TokenObjective: a method as a value, its hyperparameters and its rule, and what all methods have in common.

Layer: tokens [N] -> scalars. A method is a frozen dataclass on this base; `functions.py` makes a function of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.objectives.build import TokenTerms, build_objective
from vcpo_kernels.objectives.common import PROXIMAL_TERMS, ObjectiveTerms
from vcpo_kernels.objectives.correction import Correction
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.tokens import TokenBatch
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.aggregation import AGGREGATIONS
from vcpo_kernels.sequences.over_ranks import ranks_of
from vcpo_kernels.sequences.segments import Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True)
class TokenObjective(ABC):
    """A method as a value: the fields are its hyperparameters, `rule` gives a token's coefficient, a call a batch's loss.

    With k_t the aggregation's factor (as k_i of `vcpo_loss`), a_t and v_t the rule's coefficient and value, w_t the product of
    the correction and token_weights, c_t = k_t w_t a_t: gradient -sum_t c_t grad logp_t, and
    loss = -sum_t k_t w_t v_t + kl_coefficient sum_t k_t KL_t - entropy_coefficient sum_t k_t H_t. Tokens outside the mask
    contribute exactly nothing, whatever any input holds there. A token whose coefficient or value is not finite, or whose ratio
    is NaN or +inf, is dropped from the policy term, keeps its place in the counts, and is counted in
    metrics["nonfinite_tokens"]. No synchronisation.

    Values compare, hash, pickle and print by their hyperparameters, which are checked as the value is made. A method of one's
    own is a subclass with the same decorator, fields and a `rule`.

    aggregation: "seq-mean-token-mean" | "seq-mean-token-sum" | "seq-mean-token-sum-norm" | "token-mean".
    name: what errors begin with; without one, the class's name.
    proximal_terms: which of proximal_logp and correction a call takes.
    of_one_rank: why the rule has to see all tokens of the step, which then may not be spread over ranks; empty: it has not.

    Raises TypeError or ValueError naming the hyperparameter.

    >>> from dataclasses import replace
    >>> from vcpo_kernels import objectives
    >>> replace(objectives.CISPO(max_ratio=4.0), min_ratio=0.5)
    CISPO(aggregation='token-mean', min_ratio=0.5, max_ratio=4.0)
    """

    name: ClassVar[str]
    proximal_terms: ClassVar[tuple[str, ...]] = PROXIMAL_TERMS
    of_one_rank: ClassVar[str] = ""

    aggregation: str = "seq-mean-token-mean"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        for name, value in self.checked(self.check).items():
            object.__setattr__(self, name, value)  # numpy's numbers become Python's
        self.check.choice("aggregation", self.aggregation, AGGREGATIONS)

    @property
    def check(self) -> Check:
        """What the method's errors are raised with."""
        return Check(self.name)

    def checked(self, check: Check) -> dict[str, Any]:
        """The hyperparameters by name, checked and converted; those left out stay as they are."""
        return {}

    def each(self, verify: Callable[..., Any], *names: str, **limits: float) -> dict[str, Any]:
        """Those of these names through one of the checks, for `checked`."""
        return {name: verify(name, getattr(self, name), **limits) for name in names}

    @abstractmethod
    def rule(self, tokens: TokenBatch) -> TokenTerms:
        """Each token's coefficient, the derivative of its objective by logp, before aggregation."""

    def proximal(
        self, stats: TokenStats, logp: Tensor | None, correction: Correction | None
    ) -> tuple[Tensor | None, Correction | None]:
        """proximal_logp and correction of a call, from those it was given."""
        return logp, correction

    def __call__(
        self,
        stats: TokenStats,
        behavior_logp: Tensor,
        advantages: Tensor,
        segments: Segments,
        **terms: Unpack[ObjectiveTerms],
    ) -> ObjectiveOutput:
        """The loss of a batch.

        Args:
            stats: from `token_stats`. logp is differentiated through, and entropy where there is a bonus.
            behavior_logp: log mu of each token as the sampler recorded it, the shape of stats.logp.
            advantages: A_i [B], or A_t in the shape of stats.logp. Constants.
            segments: which tokens belong to which sequence, and which count.
            terms: see `ObjectiveTerms`; all optional.

        Returns:
            ObjectiveOutput.

        Raises:
            TypeError, ValueError: naming the argument; on the CPU also for advantages that are not finite where they count.
        """
        own, common = self.split(terms)
        if own:
            key = next(iter(own))
            raise self.check.type_error(
                f"{key} is a hyperparameter, not an argument of a call. Make another value: "
                f"dataclasses.replace(objective, {key}=...)."
            )
        if self.of_one_rank and ranks_of(self.check, common.get("ranks"), segments) is not None:
            raise self.check.value_error(
                f"ranks= (or segments' sequence_group) does not go with this method: {self.of_one_rank}. Leave them out, and "
                "each rank's tokens are a batch of their own."
            )
        given = [common.pop(key, None) if key in self.proximal_terms else None for key in PROXIMAL_TERMS]
        proximal_logp, correction = self.proximal(stats, *given)
        return build_objective(
            self.check, self.rule, stats, behavior_logp, advantages, segments, common,
            aggregation=self.aggregation, proximal_logp=proximal_logp, correction=correction,
        )  # fmt: skip

    def split(self, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments as (hyperparameters, terms of a call)."""
        names = [f.name for f in fields(self)]
        own = {key: value for key, value in keywords.items() if key in names}
        return own, {key: value for key, value in keywords.items() if key not in names}

    def with_keywords(self, *batch: Any, **keywords: Any) -> ObjectiveOutput:
        """A call whose keyword arguments may be hyperparameters as well, in place of this value's."""
        own, terms = self.split(keywords)
        return (replace(self, **own) if own else self)(*batch, **terms)
