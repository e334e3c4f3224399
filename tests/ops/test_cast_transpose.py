"""Quantising to fp8 on every backend: bit for bit what torch's own cast gives of the scaled and clamped numbers."""

import pytest
import torch
from torch import Tensor

from megascratch import ops
from megascratch.errors import LayoutError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = ((64, 64), (128, 192), (1, 1), (5, 7), (65, 130), (16, 1000), (0, 4), (3, 0))


def compare(backend, x: Tensor, scale: float, dtype: torch.dtype, schedules: int = 1) -> None:
    largest = torch.finfo(dtype).max
    expected = (x.float() * torch.tensor(scale)).clamp(-largest, largest).to(dtype).view(torch.uint8)
    for _ in backend.schedules(schedules):
        factor = torch.tensor(scale, device=backend.device)
        y, transposed = backend.ops.cast_transpose(x.to(backend.device), factor, dtype == torch.float8_e5m2)
        assert y.dtype == transposed.dtype == dtype
        assert y.is_contiguous() and transposed.is_contiguous()
        assert torch.equal(y.cpu().view(torch.uint8), expected)
        assert torch.equal(transposed.cpu().view(torch.uint8), expected.t())


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_backend_rounds_as_torch_does(backend, dtype, fp8):
    for shape in SHAPES:
        compare(backend, torch.randn(shape).to(dtype) * 3, 17.0, fp8)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_random_schedules_of_warps(backend, fp8):
    compare(backend, torch.randn(70, 90), 1.0, fp8, schedules=10)
    compare(backend, torch.randn(64, 80), 1.0, fp8, schedules=10)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_every_fp8_number_every_tie_and_beyond(backend, fp8):
    """All 256 numbers, the midpoints between neighbours (ties to even), those just beside them, and what overflows."""
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(torch.tensor(-torch.inf))])
    beyond = torch.tensor([1e5, -1e5, 3e38, torch.inf, -torch.inf, 1e-38, -1e-45, -0.0])
    x = torch.cat([numbers, middles, beside, beyond])
    compare(backend, x.view(1, -1), 1.0, fp8)
    compare(backend, x.view(-1, 1), 1.0, fp8)


def test_what_is_not_a_number_stays_so(backend):
    x = torch.tensor([[torch.nan, 1.0], [-torch.nan, torch.inf]], device=backend.device)
    for e5m2 in (False, True):
        y, transposed = backend.ops.cast_transpose(x, torch.tensor(1.0, device=backend.device), e5m2)
        assert y.float().isnan().tolist() == [[True, False], [True, False]]
        assert transposed.float().isnan().tolist() == [[True, True], [False, False]]


def test_strided_and_misaligned_rows(backend):
    wide = torch.randn(96, 160).bfloat16()
    for view in (wide[:, 8:72], wide[:, 3:67], wide[::2, :64], wide.t(), wide[:1].expand(64, 160)):
        compare(backend, view, 2.0, torch.float8_e4m3fn)


def test_offsets_beyond_32_bits(backend):
    if backend.device == "cuda":
        pytest.skip("the rows that lie between would have to be there")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16]  # memory that is never touched is never there
    apart.copy_(torch.randn(2, 16))
    compare(backend, apart, 2.0, torch.float8_e4m3fn)


def test_opcheck(backend):
    x = torch.randn(6, 5, device=backend.device)
    torch.library.opcheck(backend.ops.cast_transpose.default, (x, torch.tensor(2.0, device=backend.device), True))


def test_the_worked_example():
    y, transposed = ops.cast_transpose(torch.tensor([[1.1, 300.0]]), torch.tensor(2.0), torch.float8_e4m3fn)
    assert y.float().tolist() == [[2.25, 448.0]]
    assert transposed.float().tolist() == [[2.25], [448.0]]


def test_wrong_arguments_are_told():
    with pytest.raises(LayoutError, match=r"x \[4\] +must be a matrix"):
        ops.cast_transpose(torch.zeros(4), torch.tensor(1.0), torch.float8_e5m2)
