"""How much better than expected a token was: generalised advantage estimation, groups of samples, whitening.

*GAE* with a critic's values V, rewards r, and γ, λ:  δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1}.

    by hand, γ = 1, λ = 0.5      t        0      1      2
                                 r        0      0      1       the reward comes with the last token
                                 V        0.5    0.4    0.6
                                 δ       −0.1    0.2    0.4
                                 A        0.1    0.4    0.4     A_1 = 0.2 + 0.5 · 0.4

*Groups* need no critic: several completions of one prompt are each other's measure. Rewards 1, 0, 0, 1 have the mean
0.5 and the standard deviation 0.577 (sample) or 0.5 (population): a completion with reward 1 gets 0.5 / 0.577 = 0.866.

Legend: `n` sequences, `s` tokens, `g` completions of one prompt.
Sources: Schulman et al. 2016, arXiv:1506.02438 (GAE); Shao et al. 2024, arXiv:2402.03300 (GRPO); Liu et al. 2025,
arXiv:2503.20783 (Dr. GRPO); Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Variance = Literal["sample", "population"]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    masked: Literal["carry", "plain"] = "carry",
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate the advantage of each token that the policy chose.

    Args:
        rewards: [n, s], 0 where `mask` is.
        values: the critic's, before each token was chosen, [n, s].
        mask: 1 where the policy chose the token, [n, s].
        gamma: discount a token.
        lam: 0 trusts the critic, 1 the rewards.
        masked: what happens at tokens that the policy did not choose, as a tool's answer between its own turns:
            `carry` goes on with value and advantage of the next token that it did choose (verl); `plain` computes there
            as anywhere, with value 0 (TRL, OpenRLHF). Behind the last chosen token both are 0.
        documents: which sequence of its row a token belongs to, [n, s]; None: a row is one sequence.

    Returns: advantages and returns (advantages + values), [n, s] each; 0 where `mask` is.
    """
    mask = mask.to(values.dtype)
    values = values * mask
    kept = mask if masked == "carry" else torch.ones_like(mask)
    goes_on = torch.ones_like(mask)
    goes_on[:, -1] = 0
    if documents is not None:
        goes_on[:, :-1] = documents[:, 1:] == documents[:, :-1]
    next_values = goes_on * _following(_from_behind(kept * values, goes_on * (1 - kept)))
    deltas = rewards + gamma * next_values - values
    advantages = mask * _from_behind(kept * deltas, goes_on * (1 - kept + gamma * lam * kept))
    return advantages, advantages + values


def _from_behind(x: Tensor, factors: Tensor) -> Tensor:
    """Return y with y_t = x_t + factors_t · y_{t+1}, [n, s], in log₂ s rounds that reach twice as far each."""
    reach = 1
    while reach < x.shape[1]:
        x = x + factors * _following(x, reach)
        factors = factors * _following(factors, reach)
        reach *= 2
    return x


def _following(x: Tensor, places: int = 1) -> Tensor:
    """Return at each place of [n, s] what stands so many places later, 0 past the end."""
    return F.pad(x[:, places:], (0, places))


def whiten(x: Tensor, mask: Tensor, variance: Variance = "sample", shift_mean: bool = True) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens that count.

    Args:
        x: [n, s], the whole batch: means of parts would differ.
        mask: 1 where a token counts, [n, s].
        variance: `sample` divides by the count less one (verl, TRL), `population` by the count (OpenRLHF).
        shift_mean: False leaves the mean where it was.

    Returns: [n, s], 0 where `mask` is.
    """
    mask = mask.to(x.dtype)
    count = mask.sum()
    mean = (x * mask).sum() / count
    squares = ((x - mean).square() * mask).sum()
    scale = torch.rsqrt(squares / (count - 1 if variance == "sample" else count) + 1e-8)
    centred = (x - mean) * scale
    return (centred if shift_mean else centred + mean) * mask


@dataclass(frozen=True)
class GroupBaseline:
    """What a completion's reward is compared with, and by what the difference is divided.

    Attributes:
        leave_one_out: compare with the mean of the others of the group instead of all.
        deviation: of the group, that the difference is divided by; None: by nothing.
        eps: added to the deviation.
    """

    leave_one_out: bool = False
    deviation: Variance | None = None
    eps: float = 0.0


BASELINES = {
    "trl": GroupBaseline(deviation="sample", eps=1e-4),
    "verl": GroupBaseline(deviation="sample", eps=1e-6),
    "openrlhf": GroupBaseline(deviation="sample", eps=1e-9),
    "megatron": GroupBaseline(deviation="population", eps=1e-4),
    "dr_grpo": GroupBaseline(),
    "rloo": GroupBaseline(leave_one_out=True),
}


def group_advantages(rewards: Tensor, g: int, baseline: GroupBaseline = BASELINES["trl"]) -> Tensor:
    """Compare each completion with the others of its prompt.

    Args:
        rewards: [n], the `g` ≥ 2 completions of a prompt one after the other. NaN leaves a completion out: it gets 0,
            and the others are compared among themselves.
        g: completions of a prompt.
        baseline: how.

    Returns: [n].
    """
    grouped = rewards.view(-1, g)
    known = ~grouped.isnan()
    count = known.sum(1, keepdim=True).to(rewards.dtype)
    seen = grouped.nan_to_num(0.0)
    mean = seen.sum(1, keepdim=True) / count.clamp(min=1)
    difference = (seen - mean) * known
    if baseline.leave_one_out:  # r − (Σ − r) / (g − 1) = (r − mean) · g / (g − 1)
        difference = difference * count / (count - 1).clamp(min=1)
    if baseline.deviation is not None:
        degrees = count - 1 if baseline.deviation == "sample" else count
        deviation = (difference.square().sum(1, keepdim=True) / degrees.clamp(min=1)).sqrt()
        difference = difference / (deviation + baseline.eps)
    return difference.view(-1).nan_to_num(0.0)
