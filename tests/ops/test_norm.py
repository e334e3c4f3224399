"""RMSNorm, residual-add + RMSNorm and LayerNorm against torch in float64, on every backend, forward and backward."""

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
    "odd": (5, 7),
    "one element": (1, 1),
    "one row": (6,),
    "no row": (0, 4),
    "more rows than parts": (140, 8),
    "a block a row": (3, 1288),
    "odd, a block a row": (2, 1027),
    "more than a block keeps": (2, 16400),
}
EPS = 1e-5


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def gradients(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a function in float64."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    outputs = function(*wide)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    found = torch.autograd.grad(outputs, wide, [g.double() for g in grads])
    return [y.detach() for y in outputs], list(found)


def run(backend, name: str, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same through a backend's operators: how torch's autograd would call them."""
    device = [t.to(backend.device) for t in inputs]
    grads = [g.to(backend.device) for g in grads]
    forward, backward = getattr(backend.ops, name), getattr(backend.ops, f"{name}_backward")
    if name == "add_rms_norm":
        y, total, rstd = forward(*device, EPS)
        return [y, total], list(backward(*grads, total, device[2], rstd))
    y, *statistics = forward(*device, EPS)
    return [y], list(backward(*grads, device[0], device[1], *statistics))


# name → (of what is normalised and the parameters, how many [..., h], how many [h])
NORMS = {
    "rms_norm": (rms, 1, 1),
    "add_rms_norm": (lambda total, w: (rms(total, w), total.clone()), 2, 1),
    "layer_norm": (layer, 1, 2),
}


def compare(backend, close, name: str, inputs: list[Tensor], grads: list[Tensor], schedules: int = 3) -> None:
    dtype = inputs[0].dtype
    oracle = NORMS[name][0]
    # The sum is rounded before it is normalised, and has one gradient for both that were added.
    normalised = [inputs[0] + inputs[1], inputs[2]] if name == "add_rms_norm" else inputs
    outputs, wide_grads = gradients(oracle, normalised, grads)
    for _ in backend.schedules(schedules):
        actual, actual_grads = run(backend, name, inputs, grads)
        for y, expected in zip(actual, outputs):
            close(y, expected, dtype, scale=4 if name == "layer_norm" else 1)  # its bias may cancel
            assert y.is_contiguous()
        for grad, expected, source in zip(actual_grads, wide_grads, normalised):
            # A small gradient beside large ones is the rest of a cancellation: as exact as the largest allows.
            close(
                grad, expected, source.dtype, scale=max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", NORMS)
def test_every_backend_keeps_the_definition(backend, close, name, shape, dtype):
    _, n_rows, n_parameters = NORMS[name]
    inputs = [torch.randn(shape).to(dtype) for _ in range(n_rows)]
    inputs += [torch.randn(shape[-1]).to(dtype) for _ in range(n_parameters)]
    grads = [torch.randn(shape).to(dtype) for _ in range(n_rows)]
    compare(backend, close, name, inputs, grads, schedules=3 if shape[-1] < 5000 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_results_too_large_for_the_caches_are_those_of_their_parts(backend, name, dtype):
    if not backend.name.startswith("cpu"):
        pytest.skip("only the CPU's kernels write past the caches")
    _, n_rows, n_parameters = NORMS[name]
    rows, h = 5 * 2**20 // (128 * dtype.itemsize), 128
    inputs = [torch.randn(rows, h).to(dtype) for _ in range(n_rows)]
    inputs += [torch.randn(h).to(dtype) for _ in range(n_parameters)]
    grads = [torch.randn(rows, h).to(dtype) for _ in range(n_rows)]
    outputs, (dx, *_) = run(backend, name, inputs, grads)
    third = slice(rows // 3, 2 * rows // 3)
    some = [t[third] if t.dim() == 2 else t for t in inputs]
    expected, (expected_dx, *_) = run(backend, name, some, [g[third] for g in grads])
    for whole, part in zip([*outputs, dx], [*expected, expected_dx]):
        torch.testing.assert_close(whole[third], part, rtol=0, atol=0)


@pytest.mark.parametrize("name", NORMS)
def test_strided_and_misaligned_rows(backend, close, name):
    _, n_rows, n_parameters = NORMS[name]
    wide = torch.randn(4, 3, 5, 48).bfloat16()
    views = {
        "inner slice": wide[..., 8:40],
        "off the 16-byte grid": wide[..., 3:35],
        "one head of each group": wide[:, :, 2, :32],
        "transposed": wide.transpose(0, 2)[..., :32],
        "strided along h": wide[..., :5, :32].mT.contiguous().mT,
        "expanded": wide[:1, :, :1, :32].expand(4, 3, 5, 32),
    }
    for view in views.values():
        parameters = [torch.randn(32).bfloat16() for _ in range(n_parameters)]
        compare(backend, close, name, [view] * n_rows + parameters, [view] * n_rows)


@pytest.mark.parametrize("name", NORMS)
def test_parameters_may_be_wider_than_activations(backend, close, name):
    _, n_rows, n_parameters = NORMS[name]
    for shape in ((3, 64), (3, 7)):
        inputs = [torch.randn(shape).bfloat16() for _ in range(n_rows)]
        inputs += [torch.randn(shape[-1]) for _ in range(n_parameters)]
        compare(backend, close, name, inputs, [torch.randn(shape).bfloat16() for _ in range(n_rows)])


def test_offsets_beyond_32_bits(backend, close):
    if backend.device == "cuda":
        pytest.skip("the rows that lie between would have to be there")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16]  # memory that is never touched is never there
    apart.copy_(torch.randn(2, 16))
    compare(backend, close, "add_rms_norm", [apart, apart, torch.ones(16).bfloat16()], [apart, apart])


def test_a_large_mean_does_not_cancel(backend, close):
    x = torch.randn(2, 64) + 1000
    y, _, rstd = backend.ops.layer_norm(*[t.to(backend.device) for t in (x, torch.ones(64), torch.zeros(64))], EPS)
    expected = layer(x.double(), torch.ones(64).double(), torch.zeros(64).double())
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=2e-4)
    assert rstd.isfinite().all()


@pytest.mark.parametrize("name", NORMS)
def test_gradients_opcheck_and_recomputation(backend, name):
    _, n_rows, n_parameters = NORMS[name]
    inputs = [torch.randn(3, 2, 6, dtype=torch.float64).transpose(0, 1) for _ in range(n_rows)]
    inputs += [torch.randn(6, dtype=torch.float64) for _ in range(n_parameters)]
    torch.library.opcheck(getattr(backend.ops, name).default, (*[t.to(backend.device) for t in inputs], EPS))
    if backend.name != "reference":
        return
    for t in inputs:
        t.requires_grad_()
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(lambda *a: function(*a, EPS), inputs)
    assert torch.autograd.gradcheck(lambda x: function(x, *[t.detach() for t in inputs[1:]], EPS), inputs[:1])

    def total(*inputs: Tensor) -> Tensor:
        outputs = function(*inputs, EPS)
        return sum(y.sin().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    plain = torch.autograd.grad(total(*inputs), inputs)
    again = torch.autograd.grad(checkpoint(total, *inputs, use_reentrant=False), inputs)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_sums_over_tokens_do_not_depend_on_threads():
    x, weight = torch.randn(5000, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(ops.rms_norm(x, weight, EPS).sin().sum(), weight)[0])
    assert torch.equal(*found)
    _, (_, expected) = gradients(lambda x, w: rms(x, w).sin().sum(), [x, weight], [torch.ones(())])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-3)


def test_wrong_arguments_are_told():
    with pytest.raises(LayoutError, match=r"x \[4, 8\], parameters \[7\] +must be x \[\.\.\., h\] and \[h\]"):
        ops.rms_norm(torch.zeros(4, 8), torch.zeros(7), EPS)
    with pytest.raises(LayoutError, match=r"residual torch.float32 \[3, 8\] +must agree in shape and dtype"):
        ops.add_rms_norm(torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(8), EPS)
