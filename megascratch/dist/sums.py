"""Sums whose bits do not depend on who adds what first."""

import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.mesh import Axis


def tree_reduce_buffer(buffer: Tensor, axis: Axis) -> None:
    """Sum a gradient buffer over the axis in place, as a binary tree: (0 + 1) + (2 + 3) on every rank of four.

    The axis has a power of two of ranks, which swap their sums with the rank one, two, four … away.
    """
    assert axis.size & (axis.size - 1) == 0, f"{axis.name} has {axis.size} ranks"
    distance = 1
    while distance < axis.size:
        buffer.add_(comm.swap(buffer, axis, axis.rank ^ distance))
        distance *= 2


# 53 bits of a float64 hold the sum of 2²² slices; three of them lose nothing above 2⁻⁹⁰ of the largest number.
_SLICE_BITS = 30


def exact_sum(values: Tensor, *axes: Axis) -> Tensor:
    """Sum numbers over their last dimension and over axes: the same bits for any order and division of them.

    The largest number of all decides where every number is cut into slices; each sum of slices is exact, so only the
    sum of the three, which always has the same order, is rounded. By hand, with decimal slices of one digit of which
    two are kept: 9.57 + 0.68 = (9 + 0) + (0.5 + 0.6) = 10.1, whoever adds.

    Args:
        values: [..., n] float64, on each rank its own, of any n; at most 2²² on all ranks together.
        axes: over which the numbers are divided.

    Returns: [...] float64; not a number where one of them is infinite.

    Source: Demmel & Nguyen 2013, "Fast Reproducible Floating-Point Summation", section IV.
    """
    peak = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    for axis in axes:
        peak = comm.max_over(peak, axis)
    exponent = torch.frexp(peak).exponent.long().clamp(min=-900)  # numbers far below count as 0
    sums = []
    for level in range(1, 4):
        unit = ((exponent - level * _SLICE_BITS + 1023) << 52).view(torch.float64).unsqueeze(-1)  # a power of two
        part = torch.round(values / unit) * unit
        values = values - part
        sums.append(part.sum(-1))
    total = torch.stack(sums)
    for axis in axes:
        total = comm.sum_over(total, axis)
    return total[0] + (total[1] + total[2])
