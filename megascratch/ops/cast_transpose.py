"""Quantise a matrix to 8-bit floating point, once as it lies and once transposed.

A tensor core multiplies fp8 only along rows of both factors, and a weight, an activation or a gradient is multiplied
along its rows in one product of a training step and along its columns in another. So both are made in one reading.

Worked example, e4m3, whose numbers have three bits after the leading one: x = [[1.1, 300]] with scale 2 gives 2.2 and
600; 2.2 lies nearest to 2.25, and 600 is beyond the largest number, 448. So y = [[2.25, 448]],
and transposed = [[2.25], [448]]. Divided by the scale they stand for 1.125 and 224.

Source of the formats: Micikevicius et al. 2022, arXiv:2209.05433.
"""

import torch
from torch import Tensor

from megascratch.errors import LayoutError, Problem
from megascratch.ops.registry import Operator

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def cast_transpose(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round x · scale, computed in float32, to the nearest fp8 numbers; what is too large becomes the largest.

    Args:
        x: [rows, columns], floating point; NaN stays NaN.
        scale: one float32 number.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Returns: [rows, columns] and [columns, rows], both contiguous.

    Raises: LayoutError: if x is no matrix.
    """
    assert dtype in FP8
    if x.dim() != 2:
        raise LayoutError(Problem(f"x {list(x.shape)}", "must be a matrix, [rows, columns]"), "cast_transpose")
    return torch.ops.megascratch.cast_transpose(x, scale, dtype == torch.float8_e5m2)


def _reference(x: Tensor, scale: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    dtype = FP8[e5m2]
    largest = torch.finfo(dtype).max
    y = (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous()
    return y, y.t().contiguous()


def _fake(x: Tensor, scale: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=FP8[e5m2])
    return y, y.new_empty((x.shape[1], x.shape[0]))


OPERATORS = (Operator("cast_transpose(Tensor x, Tensor scale, bool e5m2) -> (Tensor, Tensor)", _reference, _fake),)
