"""Linear layers divided over the tensor-parallel axis.

Legend: `s` sequence, `b` micro-batch, `h` input features, `f` output features; `/tp` marks the divided dimension.

A column-parallel layer followed by a row-parallel one needs one collective at each end and none between (Shoeybi et al.
2019, arXiv:1909.08053, section 3). Under sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2)
the activations outside are divided along s, and the two collectives are an all-gather and a reduce-scatter:

    x [s/tp, b, h] ─ all_gather ─ [s, b, h] ─ column, W [f/tp, h] ─ [s, b, f/tp] ─ … row ─ reduce_scatter ─ [s/tp, b, h]

Without it they are `copy` (backward: all_reduce) and `all_reduce`, and x is [s, b, h] on every rank.

The backward is two products, and the weight's can be put off (`nn.weight_gradients`) until a schedule has time for it.
It is added to the sum over micro-batches as it is computed, where the optimizer keeps one (`main_grad`).
All three can run in 8 bits (`nn.fp8`), or overlap with their collectives (`nn.ring_products`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.layout import Init, Matrices, Split
from megascratch.dist.mesh import Axis
from megascratch.nn.fp8 import Fp8Linear, Recipe
from megascratch.nn.nf4 import Weight, values_of
from megascratch.nn.placement import Placement
from megascratch.nn.ring_products import gathered_product, gathered_weight_gradient, reduced_product
from megascratch.nn.weight_gradients import WeightGradients, main_grad, weight_gradient


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ. With `gather`, X is this rank's part of the sequence: it is gathered here, and again in backward; with
    `overlap`, part by part.

    One formula for every layout, so that the gradient of a weight is the same product, bit for bit, whether it is
    computed with that of the input or put off.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, gather: Axis | None, later: WeightGradients | None, overlap: bool = False
    ) -> Tensor:
        ctx.save_for_backward(x)
        # The weight itself: under recomputation, a saved tensor comes back as a copy with a gradient of its own.
        ctx.weight, ctx.gather, ctx.later, ctx.overlap = weight, gather, later, overlap
        values = values_of(weight)
        if gather is not None and overlap:
            return gathered_product(x, values.t(), gather)
        return _multiply(x if gather is None else comm.all_gather(x, gather), values.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,), weight, gather = ctx.saved_tensors, ctx.weight, ctx.gather
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            values = values_of(weight)
            if gather is not None and ctx.overlap:
                grad_x = reduced_product(grad, values, gather)
            else:
                grad_x = _multiply(grad, values)
                grad_x = grad_x if gather is None else comm.reduce_scatter(grad_x, gather)
        if ctx.needs_input_grad[1]:
            compute = partial(_grad_weight, x, grad, weight, gather, ctx.overlap)
            grad_weight = weight_gradient(weight, compute, ctx.later)
        return grad_x, grad_weight, None, None, None


def _multiply(x: Tensor, right: Tensor) -> Tensor:
    """[s, b, k] times [k, n] → [s, b, n]."""
    return ops.matmul(x.flatten(0, -2), right).view(*x.shape[:-1], right.shape[1])


@torch.no_grad()  # when it was put off, it does not run inside autograd's own backward
def _grad_weight(x: Tensor, grad: Tensor, weight: Tensor, gather: Axis | None, overlap: bool = False) -> Tensor | None:
    """[s/tp or s, b, h], [s, b, f] → [f, h], or None where it was added to the weight's main gradient."""
    total = main_grad(weight)
    if gather is not None and overlap and total is not None:
        gathered_weight_gradient(total, x, grad, gather)
        return None
    whole = x if gather is None else comm.all_gather(x, gather)
    left, right = grad.flatten(0, -2).t(), whole.flatten(0, -2)
    if total is None:
        return ops.matmul(left, right)
    ops.matmul_into(total, left, right, add=True)
    return None


class _RingRow(torch.autograd.Function):
    """Y = X Wᵀ, summed over ranks and divided along the sequence, with the reduce-scatter taken apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, tp: Axis, later: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.tp, ctx.later = weight, tp, later
        return reduced_product(x, values_of(weight).t(), tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        whole = grad.new_empty(*x.shape[:-1], grad.shape[-1])
        grad_x = gathered_product(grad, values_of(weight), ctx.tp, whole)
        compute = partial(_grad_weight, x, whole, weight, None)
        grad_weight = weight_gradient(weight, compute, ctx.later) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


def column_linear(
    x: Tensor,
    weight: Weight,
    tp: Axis,
    sequence_parallel: bool,
    later: WeightGradients | None = None,
    fp8: Recipe | None = None,
    overlap: bool = False,
) -> Tensor:
    """Multiply by this rank's rows of the weight: Y_i = X W_iᵀ.

    Args:
        x: [s/tp, b, h] under sequence parallelism, else [s, b, h] and the same on every rank.
        weight: this rank's rows, [f/tp, h].
        tp: tensor-parallel axis; size 1 makes this a plain linear.
        sequence_parallel: whether x is divided along s.
        later: takes the weight's gradient while it collects.
        fp8: how to multiply in 8 bits, or None.
        overlap: whether to multiply parts of the sequence while others travel, under sequence parallelism.

    Returns: [s, b, f/tp].
    """
    divided = sequence_parallel and tp.size > 1
    x, gather = (x, tp) if divided else (comm.copy(x, tp), None)
    if fp8 is not None:
        return Fp8Linear.apply(x, weight, gather, later, fp8)
    return _Linear.apply(x, weight, gather, later, overlap)


def row_linear(
    x: Tensor,
    weight: Weight,
    tp: Axis,
    sequence_parallel: bool,
    later: WeightGradients | None = None,
    fp8: Recipe | None = None,
    overlap: bool = False,
) -> Tensor:
    """Multiply by this rank's columns of the weight and sum over ranks: Y = Σ_i X_i W_iᵀ.

    Args:
        x: [s, b, h/tp].
        weight: this rank's columns, [f, h/tp].
        tp: tensor-parallel axis.
        sequence_parallel: whether the result is to be divided along s.
        later: takes the weight's gradient while it collects.
        fp8: how to multiply in 8 bits, or None.
        overlap: whether to multiply parts of the sequence while others travel, under sequence parallelism.

    Returns: [s/tp, b, f] under sequence parallelism, else [s, b, f] and the same on every rank.
    """
    if overlap and sequence_parallel and tp.size > 1:
        return _RingRow.apply(x, weight, tp, later)
    y = _Linear.apply(x, weight, None, later) if fp8 is None else Fp8Linear.apply(x, weight, None, later, fp8)
    return comm.reduce_scatter(y, tp) if sequence_parallel else comm.all_reduce(y, tp)


class ColumnParallelLinear(nn.Module):
    """Linear layer whose output features are divided over tp.

    Args:
        n_in, n_out: logical features.
        placement: where the weight lies.
        std: of the initial weight.
        blocks: sizes of weights fused along the output, each divided on its own; see `Split`.
        matrices: what the weight is made of; `blocks`, or one matrix, when left out.
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
        matrices: Matrices | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.placement = placement
        splits = (Split(0, "tp", blocks),)
        matrices = matrices or Matrices(blocks or (n_out,))
        self.weight: Weight = placement.parameter(n_out, n_in, splits=splits, init=Init(std), matrices=matrices)
        self.bias = placement.parameter(n_out, splits=splits, decay=False) if bias else None
        self.adapter: nn.Module | None = None  # `nn.adapters`

    def forward(self, x: Tensor) -> Tensor:
        """Map [s/tp or s, b, n_in] to [s, b, n_out/tp]."""
        at = self.placement
        y = column_linear(x, self.weight, at.tp, at.sequence_parallel, at.weight_gradients, at.fp8, at.tp_comm_overlap)
        y = y if self.bias is None else y + self.bias
        return y if self.adapter is None or not self.adapter.active else y + self.adapter(x)


class RowParallelLinear(nn.Module):
    """Linear layer whose input features are divided over tp.

    The bias is added once, after the sum. Under sequence parallelism each rank adds it to its own tokens, so its
    gradient is partial.
    """

    def __init__(self, n_in: int, n_out: int, placement: Placement, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.placement = placement
        self.weight: Weight = placement.parameter(
            n_out, n_in, splits=(Split(1, "tp"),), init=Init(std), matrices=Matrices((n_out,))
        )
        self.bias = placement.parameter(n_out, grad_axes=placement.token_axes, decay=False) if bias else None
        self.adapter: nn.Module | None = None  # `nn.adapters`

    def forward(self, x: Tensor) -> Tensor:
        """Map [s, b, n_in/tp] to [s/tp or s, b, n_out]."""
        at = self.placement
        y = row_linear(x, self.weight, at.tp, at.sequence_parallel, at.weight_gradients, at.fp8, at.tp_comm_overlap)
        y = y if self.bias is None else y + self.bias
        return y if self.adapter is None or not self.adapter.active else y + self.adapter(x)


class ReplicatedLinear(nn.Module):
    """Linear layer whose weight lies whole on every rank of tp, each of which has its own tokens, or all have all."""

    def __init__(self, n_in: int, n_out: int, placement: Placement, *, std: float) -> None:
        super().__init__()
        self.placement = placement
        self.weight = placement.parameter(
            n_out, n_in, grad_axes=placement.token_axes, init=Init(std), matrices=Matrices((n_out,))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [s/tp or s, b, n_in] to [s/tp or s, b, n_out]."""
        return _Linear.apply(x, self.weight, None, self.placement.weight_gradients)
