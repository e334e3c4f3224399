"""Causal attention: every backend's blocks and the reference against the definition in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascratch.errors import LayoutError
from megascratch.ops import attention, first_keys

RELATIVE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# s, t, b, n, k, d
SHAPES = {
    "training": (70, 70, 2, 6, 2, 16),
    "one group": (40, 40, 1, 4, 1, 8),
    "no groups": (33, 33, 2, 3, 3, 5),
    "whole panels": (64, 64, 3, 2, 2, 64),
    "several blocks of queries and parts": (530, 530, 1, 6, 2, 8),
    "several blocks of keys": (90, 1100, 1, 2, 1, 8),
    "wide heads": (30, 30, 1, 2, 1, 70),
    "cached": (7, 61, 2, 4, 2, 8),
    "decoding": (1, 19, 3, 2, 2, 8),
    "more queries than keys": (9, 4, 1, 2, 1, 8),
    "one of everything": (1, 1, 1, 1, 1, 1),
    "no sample": (3, 3, 0, 2, 1, 4),
    "no key": (3, 0, 1, 2, 1, 4),
    "no query": (0, 5, 1, 2, 1, 4),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and the gradient of the output."""
    s, t, b, n, k, d = shape
    sizes = ((s, b, n, d), (t, b, k, d), (t, b, k, d), (s, b, n, d))
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def plain(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The definition, by torch's softmax over all keys."""
    s, t, group = len(q), len(k), q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.arange(t) > torch.arange(s)[:, None] + t - s
    if first is not None:
        hidden = hidden | (torch.arange(t) < first[:, None, :, None])
    probs = torch.nan_to_num(scores.masked_fill(hidden, -math.inf).softmax(-1))
    return torch.einsum("bnst,tbnd->sbnd", probs, v)


def starts(s: int, t: int, b: int) -> list[Tensor | None]:
    """None; packed documents; a window for all samples; and queries that see nothing at all."""
    if s == 0 or t < s:
        return [None]
    documents = (torch.rand(b, t) < 0.1).cumsum(1)
    blind = first_keys(documents)[:, t - s :].clone()
    blind[:, ::3] = t
    window = first_keys(torch.zeros(1, t), window=5)[:, t - s :]
    return [None, first_keys(documents)[:, t - s :], window, blind]


def run(backend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *rest: object) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """Return output, log-sum-exp and the gradients of q, k, v, as torch's autograd would ask for them."""
    out, lse = backend.ops.attention(q, k, v, *rest)
    return out, lse, *backend.ops.attention_backward(grad, q, k, v, out, lse, *rest)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_and_backward_keep_the_definition(backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    if backend.name.startswith("cuda"):
        pytest.skip("attention on a GPU is torch's own")
    s, t, b, *_ = shape
    q, k, v, grad = inputs(shape, dtype)
    for first in starts(s, t, b):
        for softcap in (0.0, 2.0):
            wide = [x.double().clone().requires_grad_() for x in (q, k, v)]
            expected = plain(*wide, first, 0.4, softcap)
            expected.backward(grad.double())
            out, _, *grads = run(backend, q, k, v, grad, first, 0.4, softcap)
            assert out.dtype == dtype and out.is_contiguous()
            for got, want in zip([out, *grads], [expected, *(x.grad for x in wide)], strict=True):
                assert want is not None
                error = (got.double() - want).norm()
                assert error <= RELATIVE[dtype] * want.norm() + 1e-6 * (dtype != torch.float64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_blocks_equal_the_reference(shape: tuple[int, ...], namespaces: object) -> None:
    """Both keep the definition; here also the log-sum-exp, which only the two operators see."""
    s, t, b, *_ = shape
    q, k, v, grad = inputs(shape, torch.float64)
    for first in starts(s, t, b):
        blocks, reference = torch.ops.megascratch, torch.ops.megascratch_reference
        ours, theirs = (ops.attention(q, k, v, first, 0.4, 2.0) for ops in (blocks, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        grads = [ops.attention_backward(grad, q, k, v, *ours, first, 0.4, 2.0) for ops in (blocks, reference)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_sums_over_queries_do_not_depend_on_threads() -> None:
    tensors = inputs((530, 530, 1, 6, 2, 8), torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(SimpleNamespace(ops=torch.ops.megascratch), *tensors, None, 0.4, 0.0))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_offsets_beyond_32_bits(backend) -> None:  # type: ignore[no-untyped-def]
    """The second token of each tensor lies 2³¹ elements behind the first, in memory that is never touched."""
    if backend.name.startswith("cuda") or backend.name == "reference":
        pytest.skip("only the CPU's kernels walk strides of their own")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16].view(2, 1, 2, 8)
    apart.copy_(torch.randn(2, 1, 2, 8))
    wide = [apart.double().requires_grad_() for _ in range(3)]
    expected = plain(*wide, None, 0.4, 0.0)
    expected.backward(apart.double())
    out, _, *grads = run(backend, apart, apart, apart, apart, None, 0.4, 0.0)
    for got, want in zip([out, *grads], [expected, *(x.grad for x in wide)], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_strided_inputs_and_the_scale_that_is_left_out() -> None:
    qkv = torch.randn(20, 2, 2, 5, 8)  # as a fused projection gives them: [s, b, k, g + 2, d]
    q, k, v = qkv[..., :3, :].reshape(20, 2, 6, 8), qkv[..., 3, :], qkv[..., 4, :]
    expected = plain(q, k, v, None, 8**-0.5, 0.0)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-5, atol=1e-5)
    turned = q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    torch.testing.assert_close(attention(turned, k, v), expected, rtol=1e-5, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q = torch.full((60, 1, 1, 4), 100.0)
    k = torch.linspace(-100, 100, 60).view(60, 1, 1, 1).expand(60, 1, 1, 4)
    v = torch.arange(60.0).view(60, 1, 1, 1).expand(60, 1, 1, 4)
    out = attention(q, k, v)  # the latest key wins by far, in every block anew
    torch.testing.assert_close(out, v, rtol=0, atol=0)


def test_keys_that_no_query_sees_are_not_read() -> None:
    """Blocks outside a window or document are skipped: NaN in them does not show, not even as 0 · NaN."""
    q, k, v, _ = inputs((150, 150, 1, 2, 1, 8), torch.float32)
    k[:48], v[:48] = math.nan, math.nan
    documents = (torch.arange(150) >= 100).long().unsqueeze(0)
    assert attention(q, k, v, first_keys(documents))[111:].isfinite().all()


def test_first_keys() -> None:
    documents = torch.tensor([[7, 7, 7, 2, 2], [0, 1, 1, 1, 0]])
    assert first_keys(documents).tolist() == [[0, 0, 0, 3, 3], [0, 1, 1, 1, 4]]
    assert first_keys(documents, window=2).tolist() == [[0, 0, 1, 3, 3], [0, 1, 1, 2, 4]]
    assert first_keys(torch.zeros(1, 5), window=2).tolist() == [[0, 0, 1, 2, 3]]


def test_gradients() -> None:
    q, k, v = (torch.randn(5, 1, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    first = torch.tensor([[0, 0, 1, 2, 2]])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, first, softcap=1.5), (q, k, v))


def test_recomputation_gives_the_same_gradients() -> None:
    q, k, v = (torch.randn(50, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    plain_grads = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    again = checkpoint(attention, q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), (q, k, v)), plain_grads, rtol=0, atol=0)


def test_opcheck() -> None:
    q, k, v = (torch.randn(5, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    first = first_keys(torch.zeros(2, 5), window=2)
    torch.library.opcheck(torch.ops.megascratch.attention.default, (q, k, v, first, 0.4, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 2, 4)}, r"q \[3, 2, 4\].*must be \[s, b, n, d\]"),
        ({"v": torch.zeros(5, 2, 2, 8)}, r"v \[5, 2, 2, 8\].*twice \[t, b, k, d\]"),
        ({"q": torch.zeros(4, 2, 3, 8)}, r"3 query heads +must divide by the 2 key/value heads"),
        ({"q": torch.zeros(4, 2, 4, 8, dtype=torch.float64)}, r"q torch.float64.*must be one floating-point type"),
        (
            {"first_keys": torch.zeros(3, 4, dtype=torch.int64)},
            r"first_keys torch.int64 \[3, 4\].*\[b or 1, s\] = \[2, 4\]",
        ),
        ({"first_keys": torch.zeros(2, 4)}, r"first_keys torch.float32.*must be int64"),
        ({"softcap": -1.0}, r"softcap -1.0 +must be above 0, and 0 or more"),
    ],
)
def test_wrong_arguments_are_told(changes: dict[str, object], message: str) -> None:
    arguments = {"q": torch.zeros(4, 2, 4, 8), "k": torch.zeros(4, 2, 2, 8), "v": torch.zeros(4, 2, 2, 8)}
    with pytest.raises(LayoutError, match=message):
        attention(**{**arguments, **changes})  # type: ignore[arg-type]
