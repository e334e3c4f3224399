"""Activations against torch's own in float64, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascratch import ops
from megascratch.errors import LayoutError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 2), (6,), (0, 4)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(close, name, shape, dtype):
    agree(close, *ACTIVATIONS[name], [2 * torch.randn(shape)], dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_opcheck_and_recomputation(name):
    x = torch.randn(3, 2, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(function, (x,))
    torch.library.opcheck(getattr(torch.ops.megascratch, name).default, (x,))
    plain = torch.autograd.grad(function(x).sin().sum(), x)
    again = torch.autograd.grad(checkpoint(function, x, use_reentrant=False).sin().sum(), x)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_wrong_arguments_are_told():
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
