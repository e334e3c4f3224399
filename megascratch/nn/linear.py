"""Linear layers divided over the tensor-parallel axis.

Legend: `s` sequence, `b` micro-batch, `h` input features, `f` output features; `/tp` marks the divided dimension.

A column-parallel layer followed by a row-parallel one needs one collective at each end and none between (Shoeybi et al.
2019, arXiv:1909.08053, section 3). Under sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2)
the activations outside are divided along s, and the two collectives are an all-gather and a reduce-scatter:

    x [s/tp, b, h] ─ all_gather ─ [s, b, h] ─ column, W [f/tp, h] ─ [s, b, f/tp] ─ … row ─ reduce_scatter ─ [s/tp, b, h]

Without it they are `copy` (backward: all_reduce) and `all_reduce`, and x is [s, b, h] on every rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascratch.dist import comm
from megascratch.dist.layout import Init, Split
from megascratch.dist.mesh import Axis
from megascratch.nn.placement import Placement


class _GatherLinear(torch.autograd.Function):
    """Y_i = all_gather(X) W_iᵀ that keeps only this rank's part of X for backward, and gathers it again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = tp
        return F.linear(comm.all_gather(x, tp), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = comm.reduce_scatter(grad @ weight, ctx.tp) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).t() @ comm.all_gather(x, ctx.tp).flatten(0, -2)
        return grad_x, grad_weight, None


def column_linear(x: Tensor, weight: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """Multiply by this rank's rows of the weight: Y_i = X W_iᵀ.

    Args:
        x: [s/tp, b, h] under sequence parallelism, else [s, b, h] and the same on every rank.
        weight: this rank's rows, [f/tp, h].
        tp: tensor-parallel axis; size 1 makes this a plain linear.
        sequence_parallel: whether x is divided along s.

    Returns: [s, b, f/tp].
    """
    if tp.size == 1:
        return F.linear(x, weight)
    if sequence_parallel:
        return _GatherLinear.apply(x, weight, tp)
    return F.linear(comm.copy(x, tp), weight)


def row_linear(x: Tensor, weight: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """Multiply by this rank's columns of the weight and sum over ranks: Y = Σ_i X_i W_iᵀ.

    Args:
        x: [s, b, h/tp].
        weight: this rank's columns, [f, h/tp].
        tp: tensor-parallel axis.
        sequence_parallel: whether the result is to be divided along s.

    Returns: [s/tp, b, f] under sequence parallelism, else [s, b, f] and the same on every rank.
    """
    y = F.linear(x, weight)
    return comm.reduce_scatter(y, tp) if sequence_parallel else comm.all_reduce(y, tp)


class ColumnParallelLinear(nn.Module):
    """Linear layer whose output features are divided over tp.

    Args:
        n_in, n_out: logical features.
        placement: where the weight lies.
        std: of the initial weight.
        blocks: sizes of weights fused along the output, each divided on its own; see `Split`.
        bias: whether to add a bias, divided as the output is.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        placement: Placement,
        *,
        std: float,
        blocks: tuple[int, ...] = (),
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.placement = placement
        split = Split(0, "tp", blocks)
        self.weight = placement.parameter(n_out, n_in, split=split, init=Init(std))
        self.bias = placement.parameter(n_out, split=split, decay=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [s/tp or s, b, n_in] to [s, b, n_out/tp]."""
        y = column_linear(x, self.weight, self.placement.tp, self.placement.sequence_parallel)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(nn.Module):
    """Linear layer whose input features are divided over tp.

    The bias is added once, after the sum. Under sequence parallelism each rank adds it to its own tokens, so its
    gradient is partial.
    """

    def __init__(self, n_in: int, n_out: int, placement: Placement, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.placement = placement
        self.weight = placement.parameter(n_out, n_in, split=Split(1, "tp"), init=Init(std))
        self.bias = placement.parameter(n_out, grad_axes=placement.token_axes, decay=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [s, b, n_in/tp] to [s/tp or s, b, n_out]."""
        y = row_linear(x, self.weight, self.placement.tp, self.placement.sequence_parallel)
        return y if self.bias is None else y + self.bias
