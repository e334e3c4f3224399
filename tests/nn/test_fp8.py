"""fp8 products against a float64 emulation (quantise by hand, multiply in float64), in layers and in training."""

from dataclasses import replace

import pytest
import torch
from layouts import make_config, run_layout
from logical import fill
from torch import Tensor

from megascratch.dist.mesh import Axis, Mesh, MeshSpec
from megascratch.dist.testing import distributed, run_ranks
from megascratch.errors import ConfigError
from megascratch.nn import DTYPES, Placement, WeightGradients
from megascratch.nn.fp8 import BACKWARD, FORWARD, Tensorwise, quantize, require_fp8
from megascratch.nn.linear import ColumnParallelLinear, RowParallelLinear, column_linear, row_linear

CPU = torch.device("cpu")
LARGEST = {FORWARD: 448.0, BACKWARD: 57344.0}


def emulate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a matrix stands for after quantising, in float64."""
    magnitude = x.double().abs().max()
    scale = LARGEST[dtype] / magnitude
    step = (x.double() * scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    exponent = step.abs().clamp_min(2.0 ** (-6 if dtype is FORWARD else -14)).log2().floor()
    spacing = torch.exp2(exponent - (3 if dtype is FORWARD else 2))
    return (step / spacing).round() * spacing / scale  # torch rounds ties to even, as the formats do


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD], ids=str)
def test_quantising_is_its_emulation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 48) * torch.logspace(-6, 2, 48)
    made = quantize(x, dtype)
    for got in (made.rows, made.columns.t()):
        values = got.double() * made.unit.double()
        wrong = ((values - emulate(x, dtype)).abs() > 1e-6 * x.abs().max()).float().mean()
        assert wrong < 0.002, "but for scaled numbers that float32 puts on the other side of a tie"


def test_by_hand() -> None:
    made = quantize(torch.tensor([[0.5, 2.0], [0.3, 2.0]]), FORWARD)
    assert made.rows.float().tolist() == [[112.0, 448.0], [64.0, 448.0]]
    assert made.unit.item() == pytest.approx(1 / 224)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_products_against_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(16, 2, 48).to(dtype).requires_grad_(), torch.randn(16, 2, 64).to(dtype) * 1e-4
    weight = (torch.randn(64, 48) / 7).to(dtype).requires_grad_()
    y = column_linear(x, weight, Axis("tp"), False, fp8=Tensorwise())
    y.backward(grad)
    xe, we = emulate(x.detach().flatten(0, 1), FORWARD), emulate(weight.detach(), FORWARD)
    ge = emulate(grad.flatten(0, 1), BACKWARD)
    expected = {"y": (y, xe @ we.t()), "dx": (x.grad, ge @ we), "dw": (weight.grad, ge.t() @ xe)}
    for name, (got, want) in expected.items():
        assert got is not None and got.dtype == dtype
        error = (got.detach().double().view(want.shape) - want).norm() / want.norm()
        assert error < (1e-3 if dtype == torch.float32 else 8e-3), f"{name} is off by {error:.1e}"
        plain = {"y": x @ weight.t(), "dx": grad @ weight, "dw": grad.flatten(0, 1).t() @ x.flatten(0, 1)}[name]
        loss = (got.detach().double().view(want.shape) - plain.detach().double().view(want.shape)).norm() / want.norm()
        assert 0.01 < loss < 0.08, "three and two bits after the leading one cost a few per cent, and not nothing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use")
def test_a_gpu_multiplies_as_a_cpu_does() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    x, weight, grad = torch.randn(64, 1, 48), torch.randn(32, 48), torch.randn(64, 1, 32)
    results = []
    for device in ("cpu", "cuda"):
        own, rows = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
        y = column_linear(own, rows, Axis("tp"), False, fp8=Tensorwise())
        y.backward(grad.to(device))
        assert own.grad is not None and rows.grad is not None
        results.append([tensor.detach().cpu() for tensor in (y, own.grad, rows.grad)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2 * want.abs().max().item())


def test_zeros_and_what_is_not_finite() -> None:
    assert not column_linear(torch.zeros(16, 1, 16), torch.ones(16, 16), Axis("tp"), False, fp8=Tensorwise()).any()
    for bad in (torch.inf, torch.nan):
        x = torch.ones(16, 1, 16)
        x[3, 0, 5] = bad
        assert row_linear(x, torch.ones(16, 16), Axis("tp"), False, fp8=Tensorwise()).isnan().any()


def test_a_weight_gradient_put_off_is_the_same_to_the_bit() -> None:
    weight, later = torch.randn(32, 16).requires_grad_(), WeightGradients()
    x, grad = torch.randn(16, 1, 16).requires_grad_(), torch.randn(16, 1, 32)
    column_linear(x, weight, Axis("tp"), False, later, fp8=Tensorwise()).backward(grad)
    at_once, weight.grad = weight.grad, None
    with later.collect() as owed:
        column_linear(x, weight, Axis("tp"), False, later, fp8=Tensorwise()).backward(grad)
    assert weight.grad is None
    for compute in owed:
        compute()
    assert at_once is not None and weight.grad is not None and torch.equal(weight.grad, at_once)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@distributed(world=2)
def test_a_pair_of_layers_on_two_ranks(sequence_parallel: bool) -> None:
    """Against one rank, as near as fp8 allows: each rank scales its own part. Gathered again in backward, or not."""
    mesh = Mesh.create(MeshSpec(tp=2), CPU)
    results = []
    for at in (mesh, Mesh.serial()):
        placement = Placement(at.tp, sequence_parallel, torch.float32, CPU, fp8=Tensorwise())
        first = ColumnParallelLinear(32, 64, placement, std=0.1)
        second = RowParallelLinear(64, 32, placement, std=0.1)
        module = torch.nn.ModuleList([first, second])
        for name, param in module.named_parameters():
            param.spec = replace(param.spec, name=name)  # type: ignore[attr-defined]
        fill(module, at)
        whole = torch.randn(32, 1, 32, generator=torch.Generator().manual_seed(1))
        divided = at is mesh and sequence_parallel
        x = (whole.chunk(2)[mesh.rank] if divided else whole).clone().requires_grad_()
        y = second(first(x))
        y.square().sum().backward()
        assert x.grad is not None
        parts = (y.detach(), x.grad)
        own = sequence_parallel and not divided
        results.append(tuple(part.chunk(2)[mesh.rank] for part in parts) if own else parts)
    for got, want in zip(*results):
        error = (got - want).norm() / want.norm()
        assert error < 0.1, f"{error}"


def _losses(dtype: str, **parallel: object) -> list[float]:
    torch.set_num_threads(1)
    return [report.loss for report in run_layout(make_config("llama", parallel, dtype=dtype), 6).reports]


def test_training_in_fp8_is_training_in_bf16_but_for_rounding() -> None:
    fp8, bf16 = _losses("fp8"), _losses("bf16")
    assert fp8 == pytest.approx(bf16, rel=0.02)
    assert fp8 != bf16
    for losses in run_ranks(4, _losses, "fp8", pp=2, dp=2, zero=1, schedule="zb-h1"):
        assert losses == pytest.approx(fp8, rel=0.02)


def test_a_gpu_without_fp8_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"train.dtype = fp8 +needs .* 8\.9 .*; NVIDIA A100 has 8\.0 +use bf16"):
        require_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_fp8(torch.device("cuda"))


def test_a_torch_that_does_not_multiply_fp8_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ConfigError, match=r"is not multiplied by this torch on cpu: no kernel for this device"):
        require_fp8(CPU)


def test_parameters_are_those_of_bf16() -> None:
    assert DTYPES["fp8"] is torch.bfloat16
