"""RMSNorm, residual-add + RMSNorm, and LayerNorm over the last dimension.

RMSNorm: y = x · rstd · weight with rstd = (mean(x²) + eps)^-½. Worked example: x = (3, 4), weight 1, eps 0: the mean
square is 12.5, rstd = 0.2828, y = (0.849, 1.131).
Residual-add + RMSNorm, as between the two halves of a block: sum = x + residual, rounded, then its RMSNorm; one pass.
LayerNorm: y = (x − mean) · rstd · weight + bias with rstd = (var(x) + eps)^-½.

Their backward passes share one shape. With x̂ the normalised input and u = grad · weight,
    dx = rstd (u − x̂ mean(u x̂))                 RMSNorm
    dx = rstd (u − x̂ mean(u x̂) − mean(u))       LayerNorm
    dweight = Σ grad · x̂ over tokens, dbias = Σ grad.

Legend: `...` any leading dimensions, `h` hidden.
Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascratch.errors import LayoutError, Problem
from megascratch.ops.registry import Formula, Operator, acc_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square: x [..., h], weight [h] → [..., h] in x.dtype, computed in `acc_dtype(x)`.

    Raises: LayoutError: if weight is not [h].
    """
    _check("rms_norm", x, weight)
    y, _ = torch.ops.megascratch.rms_norm(x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise the sum: x, residual [..., h], weight [h] → normalised [..., h], sum [..., h] in x.dtype.

    Raises: LayoutError: if weight is not [h], or x and residual differ in shape or dtype.
    """
    _check("add_rms_norm", x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        value = f"x {x.dtype} {list(x.shape)}, residual {residual.dtype} {list(residual.shape)}"
        raise LayoutError(Problem(value, "must agree in shape and dtype"), "add_rms_norm")
    y, total, _ = torch.ops.megascratch.add_rms_norm(x, residual, weight, eps)
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise mean and variance: x [..., h], weight [h], bias [h] → [..., h] in x.dtype, computed in `acc_dtype(x)`.

    Raises: LayoutError: if weight or bias is not [h].
    """
    _check("layer_norm", x, weight, bias)
    y, _, _ = torch.ops.megascratch.layer_norm(x, weight, bias, eps)
    return y


def _check(name: str, x: Tensor, *parameters: Tensor) -> None:
    if x.dim() == 0 or any(p.shape != x.shape[-1:] for p in parameters):
        shapes = ", ".join(str(list(p.shape)) for p in parameters)
        raise LayoutError(Problem(f"x {list(x.shape)}, parameters {shapes}", "must be x [..., h] and [h]"), name)


def _sum_tokens(x: Tensor) -> Tensor:
    """[..., h] → [h]."""
    return x.flatten(0, -2).sum(dim=0) if x.dim() > 1 else x


def _rms_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(acc_dtype(x))
    rstd = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight).to(x.dtype).contiguous(), rstd


def _rms_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=acc_dtype(x))


def _rms_backward_wide(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x in the accumulation type, and that of the weight in its own."""
    g, normalised = grad.to(rstd.dtype), x.to(rstd.dtype) * rstd
    u = g * weight
    dx = rstd * (u - normalised * (u * normalised).mean(dim=-1, keepdim=True))
    return dx, _sum_tokens(g * normalised).to(weight.dtype)


def _rms_backward_reference(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = _rms_backward_wide(grad, x, weight, rstd)
    return dx.to(x.dtype).contiguous(), dweight


def _rms_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _add_rms_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, rstd = _rms_reference(total, weight, eps)
    return y, total, rstd


def _add_rms_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _rms_fake(x, weight, eps)
    return y, x.new_empty(x.shape), rstd


def _add_rms_backward_reference(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight = _rms_backward_wide(grad, total, weight, rstd)
    return (dx + grad_sum).to(total.dtype).contiguous(), dweight


def _add_rms_backward_fake(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _layer_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(acc_dtype(x))
    mean = wide.mean(dim=-1, keepdim=True)
    rstd = ((wide - mean).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return ((wide - mean) * rstd * weight + bias).to(x.dtype).contiguous(), mean, rstd


def _layer_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty((*x.shape[:-1], 1), dtype=acc_dtype(x))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _layer_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    g, normalised = grad.to(rstd.dtype), (x.to(rstd.dtype) - mean) * rstd
    u = g * weight
    dx = rstd * (u - normalised * (u * normalised).mean(dim=-1, keepdim=True) - u.mean(dim=-1, keepdim=True))
    dweight, dbias = _sum_tokens(g * normalised).to(weight.dtype), _sum_tokens(g).to(weight.dtype)
    return dx.to(x.dtype).contiguous(), dweight, dbias.clone()


def _layer_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _rms_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


@once_differentiable
def _rms_backward(ctx: Any, grad: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megascratch.rms_norm_backward(grad, x, weight, rstd)
    return dx, dweight, None


def _add_rms_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


@once_differentiable
def _add_rms_backward(ctx: Any, grad: Tensor, grad_sum: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megascratch.add_rms_norm_backward(grad, grad_sum, total, weight, rstd)
    return dx, dx, dweight, None


def _layer_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])


@once_differentiable
def _layer_backward(ctx: Any, grad: Tensor, _grad_mean: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.megascratch.layer_norm_backward(grad, x, weight, mean, rstd)
    return dx, dweight, dbias, None


RMS_NORM = Operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_reference,
    _rms_fake,
    Formula(_rms_save, _rms_backward),
)
RMS_NORM_BACKWARD = Operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _rms_backward_reference,
    _rms_backward_fake,
)
ADD_RMS_NORM = Operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_reference,
    _add_rms_fake,
    Formula(_add_rms_save, _add_rms_backward),
)
ADD_RMS_NORM_BACKWARD = Operator(
    "add_rms_norm_backward(Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _add_rms_backward_reference,
    _add_rms_backward_fake,
)
LAYER_NORM = Operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _layer_reference,
    _layer_fake,
    Formula(_layer_save, _layer_backward),
)
LAYER_NORM_BACKWARD = Operator(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _layer_backward_reference,
    _layer_backward_fake,
)

OPERATORS = (
    RMS_NORM,
    RMS_NORM_BACKWARD,
    ADD_RMS_NORM,
    ADD_RMS_NORM_BACKWARD,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
)
