"""KL penalties to a reference policy, as a per-token value and its derivative with respect to logp.

Layer: tokens [N]. With d = logp - reference_logp (J. Schulman, "Approximating KL Divergence", 2020). Each estimates
KL(pi || ref) in its value; what it does to the policy is another matter, since only the derivative below reaches it:

    name  value              derivative       expected gradient on samples of pi
    k1    d                  1                0: E[grad log pi] vanishes, so as a loss term it adds noise alone
    k2    d^2 / 2            d                grad KL(pi || ref), the reverse KL
    k3    exp(-d) + d - 1    1 - exp(-d)      grad KL(ref || pi), the forward KL

Adding an estimator is adding a line to ESTIMATORS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vcpo_kernels.objectives.tokens import exp_or_drop

ESTIMATORS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "k1": lambda d: (d, torch.ones_like(d)),
    "k2": lambda d: (d.square() / 2, d),
    "k3": lambda d: (exp_or_drop(-d) + d - 1, 1 - exp_or_drop(-d)),
}
