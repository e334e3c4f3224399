"""Activations against torch's own in float64, on every backend, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascratch import ops
from megascratch.errors import LayoutError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "packets": (3, 2, 64),
    "odd": (5, 14),
    "smallest": (1, 2),
    "one row": (6,),
    "no row": (0, 4),
    "no column": (3, 0),
    "many columns": (2, 4112),
    "odd, many columns": (2, 1038),
    "many rows": (300, 4),
}


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: activation(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# name → torch's
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "swiglu": _gated(F.silu),
    "geglu": _gated(F.gelu),
    "geglu_tanh": _gated(gelu_tanh),
}


def compare(backend, close, name: str, x: Tensor, schedules: int = 1) -> None:
    """Value and gradient of a backend's operator equal torch's in float64, from the same numbers."""
    wide = x.double().requires_grad_()
    expected = ACTIVATIONS[name](wide)
    grad = torch.randn(expected.shape).to(x.dtype)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    for _ in backend.schedules(schedules):
        y = getattr(backend.ops, name)(x.to(backend.device))
        close(y, expected.detach(), x.dtype, scale=4)
        dx = getattr(backend.ops, f"{name}_backward")(grad.to(backend.device), x.to(backend.device))
        close(dx, expected_grad, x.dtype, scale=4)
        assert y.is_contiguous()
        assert dx.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_backend_keeps_the_definition(backend, close, name, dtype):
    for shape in SHAPES.values():
        compare(backend, close, name, (2 * torch.randn(shape)).to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_whole_range(backend, close, name):
    """Into both tails, where the one-sided formulas take over, and to where the exponential has vanished."""
    x = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([-1e4, 1e4, 0.0])))
    if name in ("swiglu", "geglu", "geglu_tanh"):
        x = torch.stack((x, torch.ones_like(x)), dim=-1)
    compare(backend, close, name, x)
    y = getattr(backend.ops, name)(torch.full((2,), torch.nan, device=backend.device))
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["relu_squared", "swiglu"])
def test_results_too_large_for_the_caches_are_those_of_their_parts(backend, name, dtype):
    if not backend.name.startswith("cpu"):
        pytest.skip("only the CPU's kernels write past the caches")
    forward, backward = getattr(backend.ops, name), getattr(backend.ops, f"{name}_backward")
    x = torch.randn(5 * 2**20 // (64 * dtype.itemsize), 128 if name == "swiglu" else 64).to(dtype)
    grad, third = torch.randn(len(x), 64).to(dtype), slice(len(x) // 3, len(x) // 2)
    assert torch.equal(forward(x)[third], forward(x[third]))
    assert torch.equal(backward(grad, x)[third], backward(grad[third], x[third]))


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_strided_and_misaligned_rows(backend, close, name):
    wide = torch.randn(4, 3, 5, 48).bfloat16()
    views = (
        wide[..., 8:40],
        wide[..., 3:35],
        wide[:, :, 2, :32],
        wide.transpose(0, 2),
        wide.mT,
        wide[:1].expand_as(wide),
    )
    for view in views:
        even = view[..., : view.shape[-1] // 2 * 2]
        compare(backend, close, name, even)


@pytest.mark.parametrize("name", ["gelu_tanh", "geglu"])
def test_offsets_beyond_32_bits(backend, close, name):
    if backend.device == "cuda":
        pytest.skip("the rows that lie between would have to be there")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16]  # memory that is never touched is never there
    apart.copy_(torch.randn(2, 16))
    compare(backend, close, name, apart)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_opcheck_and_recomputation(backend, name):
    x = torch.randn(3, 2, 6, dtype=torch.float64, device=backend.device).transpose(0, 1)
    torch.library.opcheck(getattr(backend.ops, name).default, (x,))
    if backend.name != "reference":
        return
    x.requires_grad_()
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(function, (x,))
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
