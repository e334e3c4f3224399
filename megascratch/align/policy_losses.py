"""What policy gradients minimise, token by token, and how tokens are added up.

With ρ = π(token) / π_old(token) and the token's advantage A, the clipped loss is max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)):
a token stops to matter once it has moved far enough in the direction that pays. By hand, ε = 0.2:

    A = +1   ρ = 1.1   max(−1.1, −1.1) = −1.1    goes on                A = −1   ρ = 0.7   max(0.7, 0.8) = 0.8   stops
    A = +1   ρ = 1.5   max(−1.5, −1.2) = −1.2    stops: no gradient     A = −1   ρ = 1.5   max(1.5, 1.2) = 1.5   goes on

The last case has no bound; the dual clip gives it one, min(…, −A c).

*Adding up.* Libraries divide differently, and the engine divides once, by the number of tokens that count. So the way
is put into a weight for each token. By hand, sequences of 1 and 3 tokens, 4 places each, at most 4 new tokens:

    dapo      every token alike                      1        1 1 1              mean over all tokens
    grpo      every sequence alike                   2        2/3 2/3 2/3        mean of the sequences' means
    dr_grpo   tokens, over what there might be       0.5      0.5 0.5 0.5        sum / (2 sequences · 4 tokens)
    bnpo      as dapo, among every `train.micro_batch` completions alone, rows of their own or not

Legend: `n` sequences, `b` of them in a micro-batch, `s` tokens.
Sources: Schulman et al. 2017, arXiv:1707.06347 (PPO); Ye et al. 2020, arXiv:1912.09729 (dual clip); Yu et al. 2025,
arXiv:2503.14476 (DAPO); Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO); Zheng et al. 2025, arXiv:2507.18071 (GSPO).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.mesh import Axis

Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo"]


@dataclass(frozen=True)
class Clip:
    """Where a ratio stops to matter.

    Attributes:
        low, high: ε below and above 1; DAPO's `high` is the larger one.
        dual: c of the dual clip, more than 1; None: no bound.
        log_ratio: largest |log ρ| (20 in verl and OpenRLHF); None: no bound (TRL).
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    log_ratio: float | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """Of each token, [b, s]: the loss; and 1 where it was clipped below, above, and by the dual clip."""

    losses: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor


@dataclass(frozen=True)
class Sequences:
    """Which sequence each token of a micro-batch belongs to.

    Attributes:
        documents: number of the sequence within its row, [b, s] int64.
        n_documents: of a row, at most.
        cp: over which the rows are divided.
    """

    documents: Tensor
    n_documents: int = 1
    cp: Axis = field(default_factory=lambda: Axis("cp"))

    def sums(self, values: Tensor) -> Tensor:
        """Give every token the sum of [b, s] over its sequence, without gradient."""
        own = values.new_zeros(len(values), self.n_documents).scatter_add(1, self.documents, values.detach())
        return comm.sum_over(own, self.cp).gather(1, self.documents)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """Give every token the mean log-ratio of its sequence, with a gradient of its own (GSPO).

    The value is that of the sequence; the gradient flows through each token's own log-probability alone, so that
    parts of a sequence need nothing of each other's graph. Where a sequence's tokens weigh alike, it is the same.

    Args:
        log_ratio: log ρ of each token, [b, s].
        mask: 1 where a token counts, [b, s].
        sequences: of the tokens.

    Returns: [b, s].
    """
    mask = mask.to(log_ratio.dtype)
    mean = sequences.sums(log_ratio * mask) / sequences.sums(mask).clamp(min=1)
    return log_ratio - log_ratio.detach() + mean


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip: Clip = Clip()) -> PolicyLoss:
    """Compute the clipped loss of each token.

    Args:
        log_ratio: log ρ, [b, s]; from `sequence_log_ratio` for ratios of sequences.
        advantages: [b, s].
        clip: where it stops.
    """
    if clip.log_ratio is not None:
        log_ratio = log_ratio.clamp(-clip.log_ratio, clip.log_ratio)
    ratio = log_ratio.exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip.low, 1 + clip.high))
    beyond = torch.zeros_like(losses, dtype=torch.bool)
    if clip.dual is not None:
        bound = -advantages * clip.dual
        beyond = (advantages < 0) & (losses > bound)
        losses = torch.where(beyond, bound, losses)
    low, high = (ratio < 1 - clip.low) & (advantages < 0), (ratio > 1 + clip.high) & (advantages > 0)
    return PolicyLoss(losses, low, high, beyond)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> tuple[Tensor, Tensor]:
    """Compute the critic's loss of each token: half the square of its error.

    Args:
        values: of now, [b, s].
        old_values: of when the tokens were sampled, [b, s].
        returns: to be predicted, [b, s].
        clip: how far a value may move from the old one before moving on brings nothing; None: as far as it will.

    Returns: losses, and where they were clipped, [b, s] each.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    # min and max, not clamp: at a bound half of the gradient passes, as in the libraries that are compared with.
    moved = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    clipped = (moved - returns).square()
    return torch.maximum(plain, clipped) / 2, clipped > plain


def token_weights(mask: Tensor, how: Aggregation, *, max_tokens: int, micro_batch: int) -> Tensor:
    """Return what each token counts, such that Σ weight · loss / Σ mask is the aggregation.

    Args:
        mask: 1 where a token counts, [n, s]: of the whole global batch, in the order of its samples.
        how: see above.
        max_tokens: a completion may have, for `dr_grpo`.
        micro_batch: completions that are averaged by themselves, in the order of their samples, for `bnpo`. Packed ones
            too are counted, and not the rows that they share: packing must not change what is learned.

    Returns: [n, s] float64. Sequences without a token count in no mean but that of `dr_grpo`.
    """
    mask = mask.double()
    tokens, lengths = mask.sum(), mask.sum(1, keepdim=True)
    match how:
        case "dapo":
            return mask
        case "grpo":
            return mask / lengths.clamp(min=1) * tokens / (lengths > 0).sum().clamp(min=1)
        case "dr_grpo":
            return mask * tokens / (len(mask) * max_tokens)
        case "bnpo":
            together = mask.view(-1, micro_batch * mask.shape[1])
            counts = together.sum(1, keepdim=True)
            return (together / counts.clamp(min=1)).view_as(mask) * tokens / len(together)


def importance_weights(old: Tensor, sampled: Tensor, mask: Tensor, cap: float, sequences: Sequences | None) -> Tensor:
    """Weigh tokens by how likely the trainer's policy was to sample them, over the sampler's; at most `cap`.

    Args:
        old: log-probabilities that the trainer gives the tokens, [b, s].
        sampled: those that the sampler chose them by, [b, s].
        mask: 1 where a token counts, [b, s].
        cap: truncation (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
        sequences: whose products over their tokens are the weights; None: each token has its own.

    Returns: [b, s], no gradient.
    """
    difference = ((old - sampled) * mask).detach()
    if sequences is not None:
        difference = sequences.sums(difference)
    return difference.exp().clamp(max=cap)
