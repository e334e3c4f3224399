"""What cross-entropy needs of logits that are divided along the vocabulary: a rank's statistics, and their gradient.

A rank holds the logits of some words. One reading of them gives, for each token, the largest logit, the sum of
exp(logit − largest), and the label's logit (0 where the label lies on another rank): three numbers a token, which the
ranks combine into log Σ exp over the whole vocabulary. The gradient of log p(label) is 1[label] − p; it needs the
logits once more, and that one number.

Worked example, v = 4 on two ranks, logits (1, 3 | 2, 0), label 2: rank 0 has (3, 1 + e⁻², 0), rank 1 (2, 1 + e⁻², 2).
The largest is 3; brought to it the sums are 1.135 and 0.418, so log Σ exp = 3 + log 1.553 = 3.440; log p = 2 − 3.440.

Legend: `...` the tokens, `v/tp` this rank's columns. Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

import torch
from torch import Tensor

from megascratch.ops.registry import Operator, acc_dtype


def logit_statistics(logits: Tensor, labels: Tensor, first: int, n_real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read a rank's logits once.

    Args:
        logits: [..., v/tp].
        labels: [...] int64, of the whole vocabulary.
        first: the word of column 0.
        n_real: how many columns are words; those that follow are padding, and not read.

    Returns: peak, total and picked, [...] each in `acc_dtype(logits)`: the largest logit (−∞ of none),
    Σ exp(logit − peak), and the label's logit, or 0 where it is not among these columns.
    """
    return torch.ops.megascratch.logit_statistics(logits, labels, first, n_real)


def logit_gradient(
    grad: Tensor, logits: Tensor, labels: Tensor, log_total: Tensor, first: int, n_real: int, in_place: bool = False
) -> Tensor:
    """Return the logits' gradient from that of the labels' log-probabilities: grad · (1[label] − p).

    Args:
        grad: [...] in `acc_dtype(logits)`.
        logits, labels, first, n_real: as in `logit_statistics`.
        log_total: log Σ exp(logit) over the whole vocabulary, [...] in `acc_dtype(logits)`.
        in_place: write it over the logits, whose rows must then be regular (one stride apart, each contiguous).

    Returns: [..., v/tp] in logits.dtype; 0 in padding columns.
    """
    if in_place:
        torch.ops.megascratch.logit_gradient_(logits, grad, labels, log_total, first, n_real)
        return logits
    return torch.ops.megascratch.logit_gradient(grad, logits, labels, log_total, first, n_real)


def _own_column(labels: Tensor, first: int, n_real: int) -> tuple[Tensor, Tensor]:
    """Each label's column, 0 where it is not here; and whether it is here."""
    column = labels - first
    here = (column >= 0) & (column < n_real)
    return column.masked_fill(~here, 0), here


def _statistics_reference(logits: Tensor, labels: Tensor, first: int, n_real: int) -> tuple[Tensor, Tensor, Tensor]:
    real = logits[..., :n_real].to(acc_dtype(logits))
    if n_real == 0:
        return torch.full_like(labels, -torch.inf, dtype=real.dtype), *torch.zeros(2, *labels.shape).to(real)
    peak = real.amax(-1)
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    column, here = _own_column(labels, first, n_real)
    picked = real.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
    return peak, (real - shift.unsqueeze(-1)).exp_().sum(-1), picked


def _statistics_fake(logits: Tensor, labels: Tensor, first: int, n_real: int) -> tuple[Tensor, Tensor, Tensor]:
    peak, total, picked = (labels.new_empty(labels.shape, dtype=acc_dtype(logits)) for _ in range(3))
    return peak, total, picked


def _gradient_reference(
    grad: Tensor, logits: Tensor, labels: Tensor, log_total: Tensor, first: int, n_real: int
) -> Tensor:
    gradient = torch.zeros(logits.shape, dtype=grad.dtype, device=logits.device)
    real = gradient[..., :n_real]
    torch.exp(logits[..., :n_real].to(grad.dtype) - log_total.unsqueeze(-1), out=real)
    real.mul_(-grad.unsqueeze(-1))
    if n_real:
        column, here = _own_column(labels, first, n_real)
        real.scatter_add_(-1, column.unsqueeze(-1), grad.masked_fill(~here, 0.0).unsqueeze(-1))
    return gradient.to(logits.dtype)


def _gradient_fake(grad: Tensor, logits: Tensor, labels: Tensor, log_total: Tensor, first: int, n_real: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _gradient_in_place_reference(
    logits: Tensor, grad: Tensor, labels: Tensor, log_total: Tensor, first: int, n_real: int
) -> None:
    logits.copy_(_gradient_reference(grad, logits, labels, log_total, first, n_real))


def _gradient_in_place_fake(
    logits: Tensor, grad: Tensor, labels: Tensor, log_total: Tensor, first: int, n_real: int
) -> None:
    return None


OPERATORS = (
    Operator(
        "logit_statistics(Tensor logits, Tensor labels, int first, int n_real) -> (Tensor, Tensor, Tensor)",
        _statistics_reference,
        _statistics_fake,
    ),
    Operator(
        "logit_gradient(Tensor grad, Tensor logits, Tensor labels, Tensor log_total, int first, int n_real) -> Tensor",
        _gradient_reference,
        _gradient_fake,
    ),
    Operator(
        "logit_gradient_(Tensor(a!) logits, Tensor grad, Tensor labels, Tensor log_total, int first, int n_real) -> ()",
        _gradient_in_place_reference,
        _gradient_in_place_fake,
    ),
)
