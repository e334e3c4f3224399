"""The AdamW update against torch's optimizer, and the sum of squares, on every backend."""

import itertools

import pytest
import torch

from megascratch import ops
from megascratch.ops.adamw import halves_of, joined

SIZES = (0, 1, 7, 64, 3001, 40000)
SETTINGS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "lr": 0.01, "weight_decay": 0.3}


def arguments(backend, number: int, grad_factor: float = 1.0, taken: bool = True) -> tuple[torch.Tensor | float, ...]:
    """step, lr_scale, weight_decay, beta1, beta2, eps."""
    numbers = torch.tensor([SETTINGS["lr"] / 2, number, grad_factor, taken], dtype=torch.float64, device=backend.device)
    betas = {key: SETTINGS[key] for key in ("beta1", "beta2")}
    return ops.adamw_step(*numbers, **betas), 2.0, SETTINGS["weight_decay"], *betas.values(), SETTINGS["eps"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_backend_updates_as_torch_does(backend, n, dtype):
    theirs = torch.nn.Parameter(torch.randn(n, dtype=torch.float64))
    value = theirs.detach().to(dtype).to(backend.device)
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    reference = torch.optim.AdamW(
        [theirs], lr=SETTINGS["lr"], betas=betas, eps=SETTINGS["eps"], weight_decay=SETTINGS["weight_decay"]
    )
    state = [torch.zeros_like(value), torch.zeros_like(value)]
    for step in (1, 2, 3):
        grad = torch.randn(n, dtype=torch.float64)
        theirs.grad = grad * 0.5
        reference.step()
        backend.ops.adamw(value, grad.to(dtype).to(backend.device), *state, None, None, *arguments(backend, step, 0.5))
        rtol, atol = (1e-13, 1e-14) if dtype == torch.float64 else (2e-6, 1e-6)
        torch.testing.assert_close(value.cpu().double(), theirs.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_what_is_kept_in_half_precision_is_rounded_once(backend, n, dtype):
    kept = [torch.rand(n).to(dtype).to(backend.device) for _ in range(4)]
    wide = [x.float() for x in kept]
    for tensors in (kept, wide):
        backend.ops.adamw(*tensors, None, None, *arguments(backend, 2, 0.5))
    for one, other in zip(kept, wide):
        torch.testing.assert_close(one, other.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtypes", itertools.product([torch.float32, torch.bfloat16], repeat=4), ids=str)
def test_each_tensor_is_rounded_once_in_its_own_dtype(backend, dtypes):
    """Value, gradient and the two averages, of which any may be float32 beside any in bfloat16."""
    n = 3001
    kept = [torch.rand(n).to(dtype).to(backend.device) for dtype in dtypes]
    wide = [x.to(torch.float32, copy=True) for x in kept]
    for tensors in (kept, wide):
        backend.ops.adamw(*tensors, None, None, *arguments(backend, 2, 0.5))
    for one, other, dtype in zip(kept, wide, dtypes):
        assert one.dtype == dtype
        rounded = other.to(dtype)
        torch.testing.assert_close(one, rounded, rtol=torch.finfo(dtype).eps, atol=0)
        assert (one != rounded).float().mean() < (0.01 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize(
    ("value", "others"),
    [(torch.float64, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float16)],
)
def test_dtypes_that_do_not_go_together_are_refused(backend, value, others):
    if backend.name == "reference":
        pytest.skip("torch itself takes any")
    for odd in (1, 2, 3):
        tensors = [torch.rand(8, device=backend.device).to(others if i == odd else value) for i in range(4)]
        with pytest.raises(RuntimeError, match="must be float32 or bfloat16, as value is, or else like value"):
            backend.ops.adamw(*tensors, None, None, *arguments(backend, 1, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_the_model_gets_the_rounded_value(backend, dtype, kept, shift):
    """Also from a run that starts off the 16-byte grid, as ZeRO's may, and beside averages in either precision."""
    value, grad, exp_avg, exp_avg_sq = (torch.rand(1000 + shift, device=backend.device)[shift:] for _ in range(4))
    exp_avg, exp_avg_sq = exp_avg.to(kept), exp_avg_sq.to(kept)
    model = torch.zeros(1000 + shift, dtype=dtype, device=backend.device)[shift:]
    before = value.clone()
    backend.ops.adamw(value, grad, exp_avg, exp_avg_sq, model, None, *arguments(backend, 1))
    assert not torch.equal(value, before)
    assert torch.equal(model, value.to(dtype))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_values_in_halves_are_the_float32_ones_bit_for_bit(backend, shift, kept):
    """Beside gradients and averages in float32 as in bfloat16."""
    n = 5003 + shift
    value = torch.randn(n, device=backend.device)[shift:]
    nearest, remainder = (torch.empty(n, dtype=d, device=backend.device)[shift:] for d in (torch.bfloat16, torch.int16))
    for half, made in zip((nearest, remainder), halves_of(value)):
        half.copy_(made)
    whole = [torch.zeros(n, dtype=kept, device=backend.device)[shift:] for _ in range(2)]
    halved = [state.clone() for state in whole]
    model = torch.zeros_like(nearest)
    for step in (1, 2, 3):
        grad = torch.randn(n, device=backend.device) * 10.0 ** torch.randint(-4, 4, (n,), device=backend.device)
        grad = grad.to(kept)[shift:]
        backend.ops.adamw(value, grad, *whole, model, None, *arguments(backend, step, 0.5))
        backend.ops.adamw(nearest, grad, *halved, None, remainder, *arguments(backend, step, 0.5))
        assert torch.equal(joined(nearest, remainder).view(torch.int32), value.view(torch.int32))
        for one, other in zip(halved, whole):
            assert torch.equal(one, other)
        ties = value.view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(nearest[~ties], model[~ties])


@pytest.mark.parametrize("kept", ["whole", "beside the model", "in halves"])
def test_a_step_that_is_not_taken_changes_nothing(backend, kept):
    """Whatever the gradients hold: those of a step that overflowed are infinite or no numbers."""
    value, exp_avg, exp_avg_sq = (torch.rand(1003, device=backend.device) for _ in range(3))
    grad = torch.full_like(value, torch.nan)
    model = value.bfloat16() if kept == "beside the model" else None
    remainder = None
    if kept == "in halves":
        value, remainder = halves_of(value)
    tensors = [x for x in (value, exp_avg, exp_avg_sq, model, remainder) if x is not None]
    before = [x.clone() for x in tensors]
    backend.ops.adamw(
        value, grad, exp_avg, exp_avg_sq, model, remainder, *arguments(backend, 1, torch.nan, taken=False)
    )
    assert all(torch.equal(x, was) for x, was in zip(tensors, before))


def test_every_number_has_its_halves():
    """All 16-bit patterns in either half, infinities and zeros of both signs with them."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    for other in (0, 1, 0x3F80, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF80, 0xFFFF):
        for bits in (every << 16 | other, torch.tensor(other, dtype=torch.int32) << 16 | every):
            x = bits.view(torch.float32)
            nearest, remainder = halves_of(x)
            assert torch.equal(joined(nearest, remainder).view(torch.int32), bits)
            away = (nearest.float().double() - x.double()).abs()
            finite = x.isfinite() & nearest.isfinite()
            assert (away <= (x.to(torch.bfloat16).double() - x.double()).abs())[finite].all()
            assert torch.equal(nearest.isnan()[x.isinf()], torch.zeros_like(x, dtype=torch.bool)[x.isinf()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squared_norm(backend, dtype):
    for n in SIZES:
        x = torch.randn(n + 1).to(dtype)
        for part in (x[:n], x[1:]):
            for _ in backend.schedules(2):
                found = backend.ops.squared_norm(part.to(backend.device))
                assert found.dtype == torch.float64
                expected = part.double().square().sum()
                torch.testing.assert_close(
                    found.cpu(), expected, rtol=1e-12 if dtype == torch.float64 else 3e-6, atol=0
                )


def test_infinite_and_missing_numbers_show(backend):
    for bad in (torch.inf, torch.nan):
        x = torch.ones(5000, device=backend.device)
        x[3] = bad
        assert not backend.ops.squared_norm(x).isfinite()


def test_the_norm_does_not_depend_on_threads():
    x = torch.randn(200_001)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops.squared_norm(x).item())
    assert found[0] == found[1]


def test_opcheck(backend):
    value, grad, exp_avg, exp_avg_sq = (torch.rand(9, device=backend.device) for _ in range(4))
    model = torch.zeros(9, dtype=torch.bfloat16, device=backend.device)
    torch.library.opcheck(
        backend.ops.adamw.default, (value, grad, exp_avg, exp_avg_sq, model, None, *arguments(backend, 1))
    )
    nearest, remainder = halves_of(value)
    torch.library.opcheck(
        backend.ops.adamw.default, (nearest, grad, exp_avg, exp_avg_sq, None, remainder, *arguments(backend, 1))
    )
    torch.library.opcheck(backend.ops.squared_norm.default, (value,))
