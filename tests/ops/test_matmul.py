"""Matrix products against float64, on every backend: all orders of the operands, all sizes around a tile's."""

import itertools

import pytest
import torch

from megascratch import ops

# Of a tile and its remainders, of k beyond one step of packing, odd k (half a pair of bfloat16), of few rows and many
# columns, and of nothing.
SIZES = [(1, 1, 1), (12, 32, 8), (13, 33, 17), (100, 70, 65), (64, 96, 1030), (500, 40, 3), (3, 0, 4), (5, 6, 0)]
SIZES += [(40, 101, 530), (7, 300, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def laid_out(rows, columns, dtype, order):
    """Random numbers in rows, in columns, or with neither contiguous."""
    if order == "rows":
        return torch.randn(rows, columns).to(dtype)
    if order == "columns":
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(2 * rows + 1, 3 * columns + 1).to(dtype)[1::2, 1::3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_backend_multiplies_and_adds(backend, size, dtype):
    m, n, k = size
    for left, right in itertools.product(("rows", "columns", "strided"), repeat=2):
        a, b = laid_out(m, k, dtype, left), laid_out(k, n, dtype, right)
        for add, kept in itertools.product((False, True), {dtype, ops.acc_dtype(a)}):
            out = torch.randn(m, n + 3).to(kept)[:, 1 : n + 1]  # rows that are not neighbours
            oracle = a.double() @ b.double() + (out.double() if add else 0.0)
            out = out.to(backend.device)
            backend.ops.matmul(out, a.to(backend.device), b.to(backend.device), add)
            rtol = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[kept]
            # The reference rounds the product before it adds it to a wide result.
            rounds = backend.name in ("reference", "cuda-on-host", "cuda") and kept != dtype
            loss = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype] if rounds else 1e-6 if k else 0
            atol = 1e-12 if kept == torch.float64 else 8 * max(loss, rtol / 8) * max(k, 1) ** 0.5
            torch.testing.assert_close(out.cpu().double(), oracle, rtol=rtol, atol=atol)


def test_the_sum_does_not_depend_on_threads():
    a, b = torch.randn(700, 900), torch.randn(900, 300)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops.matmul(a, b))
    assert torch.equal(*found)


def test_a_neighbour_that_is_not_a_number_stays_outside(backend):
    """An odd k ends with half a pair; what stands behind it in memory must not be multiplied."""
    for dtype in DTYPES:
        a, b = torch.full((40, 34), torch.nan, dtype=dtype), torch.full((34, 70), torch.nan, dtype=dtype)
        a[:, :33], b[:33, :65] = 1.0, 1.0
        out = torch.zeros(40, 65, dtype=dtype, device=backend.device)
        backend.ops.matmul(out, a[:, :33].to(backend.device), b[:33, :65].to(backend.device), False)
        assert (out == 33).all()


def test_what_does_not_fit_is_refused(backend):
    if not backend.name.startswith("cpu"):
        pytest.skip("checked by torch itself")
    x = torch.zeros(4, 4)
    for out, a, b in [(x[:3], x, x), (x, x, x[:3]), (x.t(), x, x), (x.double(), x, x), (x, x, x.double())]:
        with pytest.raises(RuntimeError, match="matmul: "):
            backend.ops.matmul(out, a, b, False)


def test_small_products_and_large_are_the_same_function():
    for m in (2, 200):
        for dtype in DTYPES:
            a, b = torch.randn(m, 64).to(dtype), torch.randn(64, 64).to(dtype)
            out = torch.ones(m, 64, dtype=ops.acc_dtype(a))
            ops.matmul_into(out, a, b, add=True)
            expected = (a.double() @ b.double()).to(dtype)
            torch.testing.assert_close(ops.matmul(a, b), expected, rtol=2**-7, atol=2**-6)
            torch.testing.assert_close(out - 1, expected.to(out.dtype), rtol=2**-6, atol=2**-4)


def test_opcheck(backend):
    out, a, b = (torch.rand(9, 9, device=backend.device) for _ in range(3))
    torch.library.opcheck(backend.ops.matmul.default, (out, a, b, True))
