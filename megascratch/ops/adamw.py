"""What an optimizer step does to flat tensors, one pass each: the AdamW update, and the sum of squares.

With g = factor · grad, at step t:

    m ← β₁ m + (1 − β₁) g              value ← (1 − lr · decay) value − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)
    v ← β₂ v + (1 − β₂) g²             model ← value, rounded

Each of the tensors has a dtype of its own: what is kept in half precision is widened as it is read, and rounded once as
it is written. What changes from step to step is read from memory (`adamw_step`), so that a recording of the step can be
replayed; so is whether there is anything to be updated at all.

A float32 value beside its bfloat16 copy needs 16 bits more, not 32: those that rounding took away. The first of them
tells which way it was rounded, where halves are rounded away from zero, as `model` is not: it rounds them to even.

    float32      bfloat16   remainder
    0x3f807000   0x3f80     0x7000
    0x3f809000   0x3f81     0x9000      the first bit is set: 0x3f81 − 1, then 0x9000

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

import torch
from torch import Tensor

from megascratch.ops.registry import Operator, acc_dtype


def adamw(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_scale: float = 1.0,
    model: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    """Update value, exp_avg and exp_avg_sq in place, and write the new value into model.

    Args:
        value: [n] contiguous, any floating dtype.
        grad, exp_avg, exp_avg_sq: [n] contiguous; each in float32 or bfloat16 where value is in one of them, else in
            value's dtype. The gradient is not changed.
        step: what `adamw_step` made, on value's device.
        beta1, beta2, eps, weight_decay: as in the formula.
        lr_scale: multiplies the step's learning rate.
        model: [n] contiguous, in half precision, beside float32 values; may be None.
        remainder: [n] contiguous int16. The values are then float32 numbers, of which `value` holds the nearest
            bfloat16 ones, and there is no model.
    """
    assert step.device == value.device
    averages = exp_avg, exp_avg_sq
    torch.ops.megascratch.adamw(
        value, grad, *averages, model, remainder, step, lr_scale, weight_decay, beta1, beta2, eps
    )


def adamw_step(lr: Tensor, number: Tensor, grad_factor: Tensor, taken: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """Return what `adamw` reads of a step, [5] float64, without asking the device.

    Args:
        lr: learning rate, a scalar as all of these are.
        number: of this update, t, from 1.
        grad_factor: multiplies the gradient as it is read.
        taken: whether there is an update; where it is false, nothing changes, whatever the gradient holds.
        beta1, beta2: as in the formula.
    """
    number = number.double()
    first, second = 1.0 - torch.pow(beta1, number), 1.0 - torch.pow(beta2, number)
    return torch.stack([grad_factor.double(), lr.double(), 1.0 / first, second.rsqrt(), taken.double()])


def joined(nearest: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 numbers [...] whose nearest bfloat16 ones and int16 remainders these are."""
    low = remainder.int() & 0xFFFF
    return (nearest.view(torch.int16).int().sub_(low >> 15).bitwise_left_shift_(16) | low).view(torch.float32)


def halves_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest bfloat16 numbers of float32 ones [...], halves rounded away from zero, and the remainders."""
    bits = x.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def squared_norm(x: Tensor) -> Tensor:
    """Return Σ x², a float64 scalar on x's device; the order of summation does not depend on the number of threads."""
    return torch.ops.megascratch.squared_norm(x)


def _adamw_reference(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model: Tensor | None,
    remainder: Tensor | None,
    step: Tensor,
    lr_scale: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    dtype = acc_dtype(value)
    grad_factor, lr, first, root_factor, taken = step.unbind()
    lr, taken = lr * lr_scale, taken != 0
    scaled = grad.to(dtype) * grad_factor
    mean = exp_avg.to(dtype).lerp(scaled, 1.0 - beta1)
    square = (exp_avg_sq.to(dtype) * beta2).addcmul_(scaled, scaled, value=1.0 - beta2)
    old = value.to(dtype) if remainder is None else joined(value, remainder)
    move = mean.mul(lr * first).div_(square.sqrt().mul_(root_factor).add_(eps))
    new = (old * (1.0 - lr * weight_decay)).sub_(move)
    halves = {value: new} if remainder is None else dict(zip((value, remainder), halves_of(new)))
    for kept, made in {**halves, exp_avg: mean, exp_avg_sq: square}.items():
        kept.copy_(torch.where(taken, made.to(kept.dtype), kept))
    if model is not None:
        model.copy_(value)


def _adamw_fake(value: Tensor, *_: object) -> None:
    return None


def _squared_norm_reference(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _squared_norm_fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


OPERATORS = (
    Operator(
        "adamw(Tensor(a!) value, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? model, "
        "Tensor(e!)? remainder, Tensor step, float lr_scale, float weight_decay, float beta1, float beta2, "
        "float eps) -> ()",
        _adamw_reference,
        _adamw_fake,
    ),
    Operator("squared_norm(Tensor x) -> Tensor", _squared_norm_reference, _squared_norm_fake),
)
