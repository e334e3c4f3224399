"""How far a policy has moved from its reference: estimates of the KL divergence from sampled tokens, and its control.

With x a token that π has sampled and ℓ = log π(x) − log π_ref(x), three estimates of KL(π ‖ π_ref):

    k1 = ℓ                 no bias, may be negative, varies much
    k2 = ℓ² / 2            biased a little, varies less; its gradient is that of the divergence
    k3 = e^−ℓ + ℓ − 1      no bias, never negative

By hand, for π(x) = 0.5 and π_ref(x) = 0.25: ℓ = 0.693, k1 = 0.693, k2 = 0.240, k3 = 0.5 + 0.693 − 1 = 0.193.
Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.

A token that one of the two thinks all but impossible makes k3 overflow; libraries clamp differently, by name here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Clamp = Literal["none", "verl", "openrlhf"]

_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: (-x).exp() + x - 1,
}


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator = "k1", clamp: Clamp = "none") -> Tensor:
    """Estimate the divergence from the reference at each token, in nats.

    Args:
        logprobs: of the sampled tokens under the policy, any shape.
        reference: under the reference, of the same shape.
        estimator: k1, k2 or k3.
        clamp: `none`, as TRL; `verl`: of k3, ℓ to ±20 and the estimate to ±10; `openrlhf`: every estimate to ±10.

    Returns: in the arguments' shape and dtype.
    """
    log_ratio = logprobs - reference
    if clamp == "verl" and estimator == "k3":
        log_ratio = log_ratio.clamp(-20.0, 20.0)
    estimate = _ESTIMATORS[estimator](log_ratio)
    if clamp == "openrlhf" or (clamp == "verl" and estimator == "k3"):
        estimate = estimate.clamp(-10.0, 10.0)
    return estimate


@dataclass
class KLControl:
    """The coefficient of the KL penalty, fixed or steered towards a target.

    An adaptive one grows while the divergence is above its target and shrinks below it, by at most 20% a `horizon`:
    c ← c · (1 + clip(KL / target − 1, ±0.2) · n / horizon) (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Attributes:
        coefficient: of the penalty.
        target: divergence of a sequence to hold, in nats; None leaves the coefficient as it is.
        horizon: sequences after which a deviation has had its full effect.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, n_sequences: int) -> None:
        """Take note of the mean divergence of some sequences."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * n_sequences / self.horizon
