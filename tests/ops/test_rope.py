"""RoPE against complex multiplication in float64, on every backend."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascratch.errors import LayoutError
from megascratch.ops import acc_dtype, rope

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# s, b, n, m, d, r
SHAPES = {
    "half precision packets": (5, 2, 4, 2, 64, 64),
    "partial, packets": (3, 2, 2, 1, 64, 32),
    "partial, odd sizes": (7, 3, 3, 1, 21, 10),
    "one of everything": (1, 1, 1, 1, 2, 2),
    "no rotary dimension": (2, 1, 2, 1, 4, 0),
    "no token": (0, 2, 2, 1, 8, 8),
    "empty batch": (3, 0, 2, 1, 8, 8),
    "no key head": (3, 1, 2, 0, 8, 8),
    "many heads": (2, 1, 40, 8, 32, 32),
}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def oracle(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Multiply the pairs of x [s, b, n, d] as complex numbers by exp(i angles), angles [s, b, r/2]."""
    x, r = x.double().clone(), 2 * angles.shape[-1]
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    turned = torch.complex(x[..., first].contiguous(), x[..., second].contiguous()) * turn
    x[..., first], x[..., second] = turned.real, turned.imag
    return x


def table(s_max: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.rand(s_max, r // 2, dtype=torch.float64) * 6
    wide = acc_dtype(torch.empty((), dtype=dtype))
    return angles, angles.cos().to(wide), angles.sin().to(wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_backend_rotates_like_complex_numbers(backend, close, shape, interleaved, dtype):
    s, b, n, m, d, r = shape
    q, k = draw(s, b, n, d, dtype=dtype), draw(s, b, m, d, dtype=dtype)
    angles, cos, sin = table(s + 3, r, dtype)
    at = angles[3 : 3 + s].unsqueeze(1)
    for inverse in (False, True):
        turn = -at if inverse else at
        for _ in backend.schedules(5):
            arguments = [t.to(backend.device) for t in (q, k, cos, sin)]
            q_out, k_out = backend.ops.rope(*arguments, None, 3, interleaved, inverse)
            close(q_out, oracle(q, turn, interleaved), dtype)
            close(k_out, oracle(k, turn, interleaved), dtype)
            assert q_out.is_contiguous()
            assert k_out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_and_positions_of_each_token(backend, close, dtype):
    s, b, n, m, d = 6, 2, 4, 2, 16
    fused = draw(b, s, n + 2 * m, d, dtype=dtype).transpose(0, 1)  # as a fused projection leaves q, k and v
    q, k = fused[:, :, :n], fused[:, :, n : n + m]
    angles, cos, sin = table(9, d, dtype)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    at = angles[positions.t() + 4]
    for strided_q in (q, q.flip(-1).flip(-1), q.mT.contiguous().mT):  # the last one strides along d
        arguments = [t.to(backend.device) for t in (strided_q, k, cos, sin, positions)]
        q_out, k_out = backend.ops.rope(*arguments, 4, False, False)
        close(q_out, oracle(q, at, False), dtype)
        close(k_out, oracle(k, at, False), dtype)


def test_misaligned_rows_take_the_narrow_path(backend, close):
    storage = draw(3 * 2 * 2 * 32 + 1, dtype=torch.bfloat16)
    x = storage[1:].view(3, 2, 2, 32)
    angles, cos, sin = table(3, 32, torch.bfloat16)
    q_out, _ = backend.ops.rope(*[t.to(backend.device) for t in (x, x, cos, sin)], None, 0, False, False)
    close(q_out, oracle(x, angles.unsqueeze(1), False), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [128, 64])
def test_results_too_large_for_the_caches_are_those_of_their_parts(backend, dtype, r):
    if not backend.name.startswith("cpu"):
        pytest.skip("only the CPU's kernels write past the caches")
    n, m, d = 3, 1, 128
    s = 5 * 2**20 // (dtype.itemsize * (n + m) * d)
    q, k = draw(s, 1, n, d, dtype=dtype), draw(s, 1, m, d, dtype=dtype)
    _, cos, sin = table(s, r, dtype)
    whole = backend.ops.rope(q, k, cos, sin, None, 0, False, False)
    for start in range(0, s, s // 3):
        rows = slice(start, start + s // 3)
        part = backend.ops.rope(q[rows], k[rows], cos, sin, None, start, False, False)
        for out, expected in zip(whole, part):
            torch.testing.assert_close(out[rows], expected, rtol=0, atol=0)


def test_offsets_beyond_32_bits(backend, close):
    if backend.device == "cuda":
        pytest.skip("the tokens that lie between would have to be there")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16].view(2, 1, 2, 8)  # memory that is never touched
    apart.copy_(draw(2, 1, 2, 8))
    angles, cos, sin = table(2, 8, torch.bfloat16)
    for out in backend.ops.rope(apart, apart, cos, sin, None, 0, False, False):
        close(out, oracle(apart, angles.unsqueeze(1), False), torch.bfloat16)


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_the_table_never_reads_it(backend, position):
    q = draw(2, 1, 1, 4, dtype=torch.float32)
    _, cos, sin = table(5, 4, torch.float32)
    arguments = [t.to(backend.device) for t in (q, q, cos, sin, torch.tensor([[0, position]]))]
    if backend.name.startswith("cuda"):
        q_out, _ = backend.ops.rope(*arguments, 0, False, False)
        assert q_out[0].isfinite().all()
        assert q_out[1].isnan().all()
    else:
        with pytest.raises(RuntimeError, match="outside the table's 5"):
            backend.ops.rope(*arguments, 0, False, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_converts_as_torch_converts_it(backend, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = torch.cat((every, torch.zeros_like(every))).view(1, 1, 1, -1)  # pairs (number, 0)
    for factor in (1.0, 0.7, 1e-4):
        cos = torch.full((1, 2**16), factor)
        out, _ = backend.ops.rope(
            *[t.to(backend.device) for t in (x, x, cos, torch.zeros_like(cos))], None, 0, False, False
        )
        expected = (every.float() * factor).to(dtype)
        torch.testing.assert_close(out.cpu().flatten()[: 2**16], expected, rtol=0, atol=0, equal_nan=True)


def test_gradients():
    q = draw(4, 2, 3, 6).requires_grad_()
    k = draw(4, 2, 1, 6).requires_grad_()
    _, cos, sin = table(9, 4, torch.float64)
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    for interleaved in (False, True):
        for where in (None, positions):
            assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved, 2, where), (q, k))  # noqa: B023
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradcheck(lambda k: rope(q.detach(), k, cos, sin), (k,))


def test_recomputation_gives_the_same_gradients():
    q = draw(4, 2, 3, 6).requires_grad_()
    k = draw(4, 2, 1, 6).requires_grad_()
    _, cos, sin = table(4, 6, torch.float64)

    def attend(q: Tensor, k: Tensor) -> Tensor:
        q, k = rope(q, k, cos, sin)
        return (q * k).sin().sum()

    plain = torch.autograd.grad(attend(q, k), (q, k))
    again = torch.autograd.grad(checkpoint(attend, q, k, use_reentrant=False), (q, k))
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 2, 3, 5)}, r"must be \[s, b, n, d\] and \[s, b, m, d\]"),
        ({"cos": torch.zeros(9, 4)}, r"must both be \[s_max, r/2\] with r ≤ d = 6"),
        ({"offset": 6}, r"positions 6 to 9 +must be within the table's 9 positions +make a longer table"),
        ({"offset": -1}, r"positions -1 to 2 +must be within"),
        ({"positions": torch.zeros(4, 2, dtype=torch.int64)}, r"must be int64 \[b, s\] = \[2, 4\]"),
        ({"sin": torch.zeros(9, 3, dtype=torch.float64)}, r"the table be torch.float32"),
    ],
)
def test_wrong_arguments_are_told(change, message):
    good = {
        "q": torch.zeros(4, 2, 3, 6),
        "k": torch.zeros(4, 2, 1, 6),
        "cos": torch.zeros(9, 3),
        "sin": torch.zeros(9, 3),
    }
    rope(**good)
    with pytest.raises(LayoutError, match=message):
        rope(**(good | change))


def test_opcheck(backend):
    _, cos, sin = table(9, 4, torch.float32)
    q, k = draw(5, 2, 3, 6, dtype=torch.float32), draw(5, 2, 1, 6, dtype=torch.float32)
    arguments = tuple(t.to(backend.device) for t in (q, k, cos, sin))
    torch.library.opcheck(backend.ops.rope.default, (*arguments, None, 1, False, False))
    torch.library.opcheck(
        torch.ops.megascratch.rope.default,
        (q.requires_grad_(), k.requires_grad_(), cos, sin, torch.zeros(2, 5, dtype=torch.int64), 1, True, False),
    )
