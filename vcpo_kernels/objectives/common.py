"""CommonTerms and ObjectiveTerms: the keyword arguments that objectives share, their defaults and their checks.

Layer: arguments, before any tensor is touched.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.objectives.correction import Correction
from vcpo_kernels.objectives.kl import ESTIMATORS
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.sequences.aggregation import AGGREGATIONS


class CommonTerms(TypedDict, total=False):
    """Keyword arguments that every objective takes; all optional.

    num_sequences, num_tokens: B and sum|T| of the whole step, where this batch is one micro-batch of several. None: counted.
    max_tokens: T_max of "seq-mean-token-sum-norm". None: the padded length.
    token_weights: constant factors before the policy term (not KL or entropy), [B] or in the shape of stats.logp: a
        trainer's own importance weights, a mask of the tokens to train on.
    reference_logp: log pi_ref of each token, for the KL penalty. kl_coefficient: its factor, >= 0.
    kl_estimator: "k1" | "k2" | "k3" (`kl.ESTIMATORS` says which gradient each gives).
    kl_importance_weighted: take r KL_t instead, r = exp(log_ratio) of the token and differentiated through (DeepSeek-V3.2,
        arXiv 2512.02556; TRL's use_bias_correction_kl): unbiased on samples of mu, and k3's gradient becomes r d grad logp.
    entropy_coefficient: factor of the entropy bonus, aggregated like the loss; of either sign.
    ess_max_weight: truncation of the weights that ESS is taken of. None: unclipped.
    ranks: the ranks that hold the step's other sequences and, where segments have a sequence_group, their sequences' other
        tokens. Counts, ESS and metrics are then the whole step's, the same bits on every rank, and the loss is this rank's
        share: gradients are to be summed over data and sequence ranks (`Ranks.averaged`). Two collectives; methods that
        weigh whole sequences take one more for each sum that they make over sequence ranks, and M2PO, which sorts all
        tokens, is refused.
    """

    num_sequences: float | None
    num_tokens: float | None
    max_tokens: float | None
    token_weights: Tensor | None
    reference_logp: Tensor | None
    kl_coefficient: float
    kl_estimator: str
    kl_importance_weighted: bool
    entropy_coefficient: float
    ess_max_weight: float | None
    ranks: Ranks | None


class ObjectiveTerms(CommonTerms, total=False):
    """`CommonTerms`, and two where the method has a proximal policy (`TokenObjective.proximal_terms`).

    proximal_logp: log pi_prox of each token, the policy of the last update, which the ratio is taken against. None: the
        behaviour policy, r = pi/mu.
    correction: the factor pi_prox/mu before the policy term (decoupled PPO, AReaL, arXiv 2505.24298; TRL's
        vllm_importance_sampling_*); needs proximal_logp.
    """

    proximal_logp: Tensor | None
    correction: Correction | None


PROXIMAL_TERMS = ("proximal_logp", "correction")

DEFAULTS: CommonTerms = {
    "kl_coefficient": 0.0,
    "kl_estimator": "k3",
    "kl_importance_weighted": False,
    "entropy_coefficient": 0.0,
    "ranks": None,
}


def checked_terms(check: Check, aggregation: str, common: Any) -> dict[str, Any]:
    """The common terms with their defaults, checked. Raises TypeError or ValueError naming the argument."""
    known = CommonTerms.__annotations__
    if unknown := [key for key in common if key not in known]:
        raise check.type_error(f"unknown argument {unknown[0]!r}. Beside the method's own it takes {', '.join(known)}.")
    terms: dict[str, Any] = {**DEFAULTS, **common}
    check.choice("aggregation", aggregation, AGGREGATIONS)
    check.choice("kl_estimator", terms["kl_estimator"], tuple(ESTIMATORS))
    for key in ("num_sequences", "num_tokens", "max_tokens", "ess_max_weight"):
        terms[key] = check.optional_positive_float(key, terms.get(key))
    check.boolean("kl_importance_weighted", terms["kl_importance_weighted"])
    terms["kl_coefficient"] = check.finite_float("kl_coefficient", terms["kl_coefficient"], minimum=0.0)
    terms["entropy_coefficient"] = check.finite_float("entropy_coefficient", terms["entropy_coefficient"])
    if terms["kl_coefficient"] and terms.get("reference_logp") is None:
        raise check.value_error(
            f"kl_coefficient={terms['kl_coefficient']} needs reference_logp, log pi_ref of each token."
        )
    return terms
