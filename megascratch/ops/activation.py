"""Activations of the feed-forward layer, plain and gated.

The gated ones take gate and up projections side by side, as one fused matrix product leaves them: gate_up = [gate; up]
along the last dimension, and y = activation(gate) · up.

Worked example, f = 1: gate_up = (2, 10): SwiGLU gives 2 σ(2) · 10 = 17.62; GeGLU gives 2 Φ(2) · 10 = 19.54, with σ the
logistic function and Φ the normal distribution function.

Legend: `...` any leading dimensions, `f` feed-forward features. Sources: Hendrycks and Gimpel 2016, arXiv:1606.08415
(GELU); Shazeer 2020, arXiv:2002.05202 (SwiGLU, GeGLU); So et al. 2021, arXiv:2109.08668 (squared ReLU).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascratch.errors import LayoutError, Problem
from megascratch.ops.registry import Formula, Operator, acc_dtype


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), exact, element by element in x.dtype."""
    return torch.ops.megascratch.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), GELU's approximation in GPT-2 and Gemma, in x.dtype."""
    return torch.ops.megascratch.gelu_tanh(x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², element by element in x.dtype."""
    return torch.ops.megascratch.relu_squared(x)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up: gate_up [..., 2f] = [gate; up] → [..., f].

    Raises: LayoutError: if the last dimension is odd.
    """
    _check_even("swiglu", gate_up)
    return torch.ops.megascratch.swiglu(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """GELU(gate) · up: gate_up [..., 2f] = [gate; up] → [..., f].

    Raises: LayoutError: if the last dimension is odd.
    """
    _check_even("geglu", gate_up)
    return torch.ops.megascratch.geglu(gate_up)


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """GELU(gate) · up with the tanh approximation: gate_up [..., 2f] = [gate; up] → [..., f].

    Raises: LayoutError: if the last dimension is odd.
    """
    _check_even("geglu_tanh", gate_up)
    return torch.ops.megascratch.geglu_tanh(gate_up)


def _check_even(name: str, gate_up: Tensor) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise LayoutError(Problem(f"gate_up {list(gate_up.shape)}", "must be [..., 2f]: gate, then up"), name)


class Curve(NamedTuple):
    """An activation function and its derivative, both on wide (accumulation type) tensors."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5))


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    # ½ (1 + tanh u) = σ(2u), so the value is x σ(2u) and the slope σ + x σ (1 − σ) 2u′.
    scale = 2 * (2 / torch.pi) ** 0.5
    gate = torch.sigmoid(scale * (x + 0.044715 * x * x * x))
    return gate + x * gate * (1 - gate) * scale * (1 + 3 * 0.044715 * x * x)


SILU = Curve(torch.nn.functional.silu, _silu_slope)
GELU = Curve(torch.nn.functional.gelu, lambda x: _normal_cdf(x) + x * _normal_density(x))
GELU_TANH = Curve(_gelu_tanh, _gelu_tanh_slope)
RELU_SQUARED = Curve(lambda x: x.relu().square(), lambda x: 2 * x.relu())


def _plain(name: str, curve: Curve) -> tuple[Operator, Operator]:
    def forward(x: Tensor) -> Tensor:
        return curve.value(x.to(acc_dtype(x))).to(x.dtype).contiguous()

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return (grad.to(acc_dtype(x)) * curve.slope(x.to(acc_dtype(x)))).to(x.dtype).contiguous()

    return _pair(name, forward, lambda x: x.new_empty(x.shape), backward)


def _gated(name: str, curve: Curve) -> tuple[Operator, Operator]:
    def forward(x: Tensor) -> Tensor:
        gate, up = x.to(acc_dtype(x)).chunk(2, dim=-1)
        return (curve.value(gate) * up).to(x.dtype).contiguous()

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        gate, up = x.to(acc_dtype(x)).chunk(2, dim=-1)
        g = grad.to(acc_dtype(x))
        return torch.cat((g * up * curve.slope(gate), g * curve.value(gate)), dim=-1).to(x.dtype)

    return _pair(name, forward, lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)), backward)


def _pair(name: str, reference: Callable, fake: Callable, backward_reference: Callable) -> tuple[Operator, Operator]:
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return getattr(torch.ops.megascratch, f"{name}_backward")(grad, x)

    def save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    return (
        Operator(f"{name}(Tensor x) -> Tensor", reference, fake, Formula(save, backward)),
        Operator(f"{name}_backward(Tensor grad, Tensor x) -> Tensor", backward_reference, _like_input),
    )


def _like_input(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


OPERATORS = (
    *_plain("gelu", GELU),
    *_plain("gelu_tanh", GELU_TANH),
    *_plain("relu_squared", RELU_SQUARED),
    *_gated("swiglu", SILU),
    *_gated("geglu", GELU),
    *_gated("geglu_tanh", GELU_TANH),
)
