"""Matrix products into a given tensor, where it pays by a kernel of ours: out = a b, or out += a b.

A linear layer's gradient is summed over micro-batches in float32, whatever the model's dtype. Where the product adds to
that sum itself, no gradient in the model's dtype is ever written, rounded or read again.

On a CPU our kernel serves float32 and float64 (the BLAS that torch brings reaches half of what AMD's cores can do), and
bfloat16 where the processor multiplies it; everything else, small products too, is torch's own.
"""

import torch
from torch import Tensor

from megascratch.ops.registry import Operator

# Rows of the result that repay packing b, or reading its columns as they lie; and the least of products.
_LEAST_ROWS, _LEAST_DIRECT_ROWS, _LEAST_PRODUCTS = 32, 16, 32 * 32 * 32
# More elements than the result has. glibc wants 112 bytes more than an aligned block takes, so one that is freed has no
# room for another of its size; what a product leaves, another operator's result of that size shall have.
_SPARE = 64


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [m, k] by b [k, n], of one dtype and any strides → [m, n], contiguous."""
    if not _pays(a, b):
        return a @ b
    m, n = a.shape[0], b.shape[1]
    out = a.new_empty(m * n + _SPARE).as_strided((m, n), (n, 1))
    torch.ops.megascratch.matmul(out, a, b, False)
    return out


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Write a b to out [m, n], or add it to what out holds.

    Args:
        out: rows contiguous; of the operands' dtype, or float32, in which the sums are then kept.
        a, b: [m, k] and [k, n], of one dtype and any strides.
        add: whether out keeps what it holds.
    """
    if _pays(a, b):
        torch.ops.megascratch.matmul(out, a, b, add)
    else:
        _reference(out, a, b, add)


def _pays(a: Tensor, b: Tensor) -> bool:
    """Whether our kernel is there and faster than torch's product."""
    m, k = a.shape
    return (
        a.device.type == "cpu"
        and a.dtype in _FAST_DTYPES
        and m >= (_LEAST_DIRECT_ROWS if b.stride(0) == 1 and a.dtype != torch.bfloat16 else _LEAST_ROWS)
        and m * k * b.shape[1] >= _LEAST_PRODUCTS
    )


def _fast_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes in which the compiled kernel beats torch's own products on this processor."""
    has_tiles = torch.cpu._is_amx_tile_supported()  # oneDNN multiplies bfloat16 by them, 8 times as fast
    if torch.cpu._is_avx512_bf16_supported() and not has_tiles:
        return torch.float64, torch.float32, torch.bfloat16
    return torch.float64, torch.float32


_FAST_DTYPES = _fast_dtypes()


def _reference(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if add and out.dtype == a.dtype:
        out.addmm_(a, b)
    elif add:
        out.add_(a @ b)
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _fake(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    return None


OPERATORS = (Operator("matmul(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()", _reference, _fake),)
