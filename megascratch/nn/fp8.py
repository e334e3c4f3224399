"""Linear layers whose three products run in fp8 (`train.dtype = "fp8"`): weights, bucket gradients and all else stay.

Legend: `m` tokens, `h` input features, `f` output features; hats are fp8 numbers, α their scales.

Tensorwise current scaling: a tensor is multiplied by α = largest number of the format / its own largest magnitude, so
that nothing overflows and the format's range is used, then rounded. Products accumulate in float32 and are divided by
both scales. Activations and weights take e4m3 (three bits of precision), gradients e5m2 (range):

    Y  = X̂ Ŵᵀ  / (α_X α_W)       [m, h] · [h, f]     multiplied along h
    dX = Ĝ Ŵ   / (α_G α_W)       [m, f] · [f, h]     along f: needs Ŵᵀ
    dW = Ĝᵀ X̂  / (α_G α_X)       [f, m] · [m, h]     along m: needs Ĝᵀ and X̂ᵀ

By hand: X = [0.5, 2.0] has α = 448 / 2 = 224; X̂ = [112, 448], both exact. X = [0.3, 2.0] gives 67.2, which rounds to
64: read back, 0.2857.

Each rank scales by what it holds, so layouts round differently here, as they do in every 16-bit format.

Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.errors import ConfigError, Problem
from megascratch.nn.weight_gradients import WeightGradients, main_grad, weight_gradient

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 2.0**-100  # a tensor of zeros gets a finite scale, with a finite reciprocal


@dataclass(frozen=True)
class Quantized:
    """A matrix in fp8, times `unit` what it stands for.

    Attributes:
        rows: [r, c], contiguous.
        columns: its transpose, [c, r], contiguous.
        unit: one float32 number, 1 / α.
    """

    rows: Tensor
    columns: Tensor
    unit: Tensor


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Quantise a matrix [r, c] by its own largest magnitude. One that is not finite makes NaN, which training skips."""
    largest = torch.finfo(dtype).max
    magnitude = torch.linalg.vector_norm(x, ord=torch.inf).float().clamp_min(_SMALLEST)
    rows, columns = ops.cast_transpose(x, largest / magnitude, dtype)
    return Quantized(rows, columns, magnitude / largest)


def product(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Multiply along the rows of both: A Bᵀ, [r, k], [c, k] → [r, c].

    Args:
        a, b: fp8, contiguous.
        unit_a, unit_b: what their numbers stand for.
        dtype: of the result.
        fast: whether a GPU may accumulate in fewer bits than float32, which forward passes bear.
    """
    return torch._scaled_mm(a, b.t(), scale_a=unit_a, scale_b=unit_b, out_dtype=dtype, use_fast_accum=fast)


class Fp8Linear(torch.autograd.Function):
    """Y = X Wᵀ in fp8; arguments as in `nn.linear`: with `gather`, X is gathered here and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gather: Axis | None, later: WeightGradients | None) -> Tensor:
        ctx.weight, ctx.gather, ctx.later = weight, gather, later
        whole = x if gather is None else comm.all_gather(x, gather)
        xq, wq = quantize(whole.flatten(0, -2), FORWARD), quantize(weight, FORWARD)
        # Gathered, this rank's 16-bit part is no larger than the whole in 8 bits.
        ctx.save_for_backward(*((xq.columns, xq.unit) if gather is None else (x,)))
        y = product(xq.rows, wq.rows, xq.unit, wq.unit, x.dtype, fast=True)
        return y.view(*whole.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, saved = ctx.weight, ctx.saved_tensors
        grad_x = grad_weight = None
        gq = quantize(grad.flatten(0, -2), BACKWARD)
        if ctx.needs_input_grad[0]:
            wq = quantize(weight, FORWARD)
            grad_x = product(gq.rows, wq.columns, gq.unit, wq.unit, grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
            if ctx.gather is not None:
                grad_x = comm.reduce_scatter(grad_x, ctx.gather)
        if ctx.needs_input_grad[1]:
            compute = partial(_grad_weight, saved, gq, weight, ctx.gather)
            grad_weight = weight_gradient(weight, compute, ctx.later)
        return grad_x, grad_weight, None, None


@torch.no_grad()  # when it was put off, it does not run inside autograd's own backward
def _grad_weight(saved: tuple[Tensor, ...], grad: Quantized, weight: Tensor, gather: Axis | None) -> Tensor | None:
    """[m, f] with what forward saved of [m, h] → [f, h], or None where it was added to the weight's main gradient."""
    if gather is None:
        columns, unit = saved
    else:
        xq = quantize(comm.all_gather(saved[0], gather).flatten(0, -2), FORWARD)
        columns, unit = xq.columns, xq.unit
    total = main_grad(weight)
    if total is None:
        return product(grad.columns, columns, grad.unit, unit, weight.dtype)
    total.add_(product(grad.columns, columns, grad.unit, unit, torch.float32))
    return None


def require_fp8(device: torch.device) -> None:
    """Check before training that a device multiplies fp8.

    Raises: ConfigError: if it does not, naming it.
    """
    rule = ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            name = torch.cuda.get_device_name(device)
            rule = f"needs a GPU of compute capability 8.9 (Ada, Hopper) or newer; {name} has {major}.{minor}"
    else:
        one, tile = torch.ones((), device=device), torch.zeros(16, 16, dtype=torch.uint8, device=device)
        try:
            product(tile.view(BACKWARD), tile.view(FORWARD), one, one, torch.bfloat16)
        except (RuntimeError, NotImplementedError) as error:
            rule = f"is not multiplied by this torch on {device.type}: {str(error).splitlines()[0]}"
    if rule:
        raise ConfigError(Problem("train.dtype = fp8", rule, "use bf16"))
