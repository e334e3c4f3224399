"""Norms and activations against torch's own in float64, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascratch import ops
from megascratch.errors import LayoutError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 2, 8), (5, 7), (1, 1), (6,), (0, 4))
EPS = 1e-5

# name → (ours, torch's, how many [h] parameters)
NORMS = {
    "rms_norm": (ops.rms_norm, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps), 1),
    "layer_norm": (ops.layer_norm, lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps), 2),
}


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: activation(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


# name → (ours, torch's)
ACTIVATIONS = {
    "gelu": (ops.gelu, F.gelu),
    "gelu_tanh": (ops.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "relu_squared": (ops.relu_squared, lambda x: F.relu(x) ** 2),
    "swiglu": (ops.swiglu, _gated(F.silu)),
    "geglu": (ops.geglu, _gated(F.gelu)),
    "geglu_tanh": (ops.geglu_tanh, _gated(lambda x: F.gelu(x, approximate="tanh"))),
}


def agree(close, ours: Callable, theirs: Callable, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values and all gradients of ours in dtype equal those of theirs in float64, from the same numbers."""
    mine = [t.to(dtype).requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in mine]
    y, expected = ours(*mine), theirs(*wide)
    grad = torch.randn(expected.shape).to(dtype)
    close(y, expected.detach(), dtype)
    pairs = zip(torch.autograd.grad(y, mine, grad), torch.autograd.grad(expected, wide, grad.double()))
    for actual, oracle in pairs:
        # A small gradient beside large ones is the rest of a cancellation: as exact as the largest allows.
        close(actual, oracle, dtype, scale=max([1.0, *oracle.abs().flatten().tolist()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms(close, name, shape, dtype):
    ours, theirs, n_parameters = NORMS[name]
    inputs = [torch.randn(shape), *torch.randn(n_parameters, shape[-1])]
    agree(close, lambda *a: ours(*a, EPS), lambda *a: theirs(*a, EPS), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 2), (6,), (0, 4)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(close, name, shape, dtype):
    agree(close, *ACTIVATIONS[name], [2 * torch.randn(shape)], dtype)


@pytest.mark.parametrize("name", [*NORMS, *ACTIVATIONS])
def test_gradients_opcheck_and_recomputation(name):
    x = torch.randn(3, 2, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    parameters = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(NORMS.get(name, (0, 0, 0))[2])]
    extra = (EPS,) if name in NORMS else ()
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(lambda *a: function(*a, *extra), (x, *parameters))
    assert torch.autograd.gradcheck(lambda x: function(x, *[p.detach() for p in parameters], *extra), (x,))
    torch.library.opcheck(getattr(torch.ops.megascratch, name).default, (x, *parameters, *extra))

    plain = torch.autograd.grad(function(x, *parameters, *extra).sin().sum(), x)
    again = torch.autograd.grad(checkpoint(function, x, *parameters, *extra, use_reentrant=False).sin().sum(), x)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_parameters_may_be_wider_than_activations():
    x, weight = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)
    y = ops.rms_norm(x, weight, EPS)
    assert y.dtype == torch.bfloat16
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


def test_wrong_arguments_are_told():
    with pytest.raises(LayoutError, match=r"x \[4, 8\], parameters \[7\] +must be x \[\.\.\., h\] and \[h\]"):
        ops.rms_norm(torch.zeros(4, 8), torch.zeros(7), EPS)
    with pytest.raises(LayoutError, match=r"gate_up \[4, 7\] +must be \[\.\.\., 2f\]"):
        ops.swiglu(torch.zeros(4, 7))


def test_accumulation_types():
    types = {d: ops.acc_dtype(torch.empty((), dtype=d)) for d in DTYPES}
    assert types == {
        torch.float64: torch.float64,
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }
