"""Cross-entropy over logits that are divided along the vocabulary, never gathered.

Legend: `s` sequence, `b` micro-batch, `v` vocabulary. Three small reductions replace the gather of [s, b, v]: the
maximum, the sum of exponentials, and the label's logit, each [s, b] (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from typing import Any

import torch
from torch import Tensor

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.mesh import Axis


class _TokenLogprobs(torch.autograd.Function):
    """log p(label) = logit[label] − log Σ exp(logit), and its gradient 1[label] − p, on each rank's own columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
        part = logits.shape[-1]
        first = tp.rank * part
        n_real = min(max(vocab_size - first, 0), part)  # the last ranks may hold padding columns
        real = logits[..., :n_real].to(ops.acc_dtype(logits))
        own_peak = real.amax(-1) if n_real else real.new_full(labels.shape, -torch.inf)
        peak = comm.max_over(own_peak, tp)
        exps = (real - peak.unsqueeze(-1)).exp_()
        total = comm.sum_over(exps.sum(-1), tp)
        column = labels - first
        elsewhere = (column < 0) | (column >= n_real)
        column = column.masked_fill(elsewhere, 0)
        if n_real:
            picked = real.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        else:
            picked = real.new_zeros(labels.shape)
        ctx.save_for_backward(exps.div_(total.unsqueeze(-1)), column, elsewhere)
        ctx.n_columns, ctx.dtype = part, logits.dtype
        return comm.sum_over(picked, tp) - peak - total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, column, elsewhere = ctx.saved_tensors
        grad_logits = probabilities.new_zeros((*probabilities.shape[:-1], ctx.n_columns))
        real = grad_logits[..., : probabilities.shape[-1]]
        torch.mul(probabilities, -grad.unsqueeze(-1), out=real)
        if probabilities.shape[-1]:
            real.scatter_add_(-1, column.unsqueeze(-1), grad.masked_fill(elsewhere, 0.0).unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None


def token_logprobs(logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Return the log-probability, in nats, of each label.

    Args:
        logits: this rank's columns, [s, b, v/tp], padding columns included.
        labels: [s, b], int64, 0 ≤ label < vocab_size; any other value must be masked by the caller.
        vocab_size: logical v.
        tp: tensor-parallel axis.

    Returns: [s, b] in `acc_dtype`, the same on every rank of tp.
    """
    return _TokenLogprobs.apply(logits, labels, vocab_size, tp)
