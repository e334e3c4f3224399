"""Scaled masked softmax against its definition in float64, on every backend, forward and backward."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascratch.errors import LayoutError
from megascratch.ops import scaled_softmax

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# b, n, sq, sk
SHAPES = {
    "packets": (2, 3, 16, 64),
    "odd": (2, 3, 5, 37),
    "one of everything": (1, 1, 1, 1),
    "decoding": (2, 1, 1, 19),
    "more queries than keys": (1, 2, 9, 4),
    "empty batch": (0, 2, 3, 4),
    "no key": (1, 2, 3, 0),
    "a block a row": (1, 1, 3, 1030),
    "odd, beyond 4096": (1, 2, 1, 4099),
}


def oracle(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """The definition, key by key: hidden keys have weight 0."""
    sq, sk = scores.shape[-2:]
    x = scores.double() * scale
    hidden = torch.zeros_like(x, dtype=torch.bool)
    if causal:
        hidden |= torch.arange(sk) > torch.arange(sq)[:, None] + sk - sq
    if mask is not None:
        hidden |= mask
    x = x.masked_fill(hidden, -torch.inf)
    top = x.amax(dim=-1, keepdim=True) if sk else x.sum(dim=-1, keepdim=True)
    weights = (x - top.clamp(min=-1e300)).exp()
    return torch.nan_to_num(weights / weights.sum(dim=-1, keepdim=True))


def masks(b: int, n: int, sq: int, sk: int) -> list[Tensor | None]:
    """None, a full mask with a row that hides every key, and masks that broadcast each dimension."""
    full = torch.rand(b, n, sq, sk) < 0.4
    full[..., :1, :] = True
    return [None, full, torch.rand(b, 1, sq, sk) < 0.4, torch.rand(1, n, 1, sk) < 0.4, torch.rand(b, 1, sq, 1) < 0.4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_backend_keeps_the_definition(backend, close, shape, dtype):
    scores, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    scale = 0.7
    for causal in (False, True):
        for mask in masks(*shape)[: 5 if scores.numel() < 1000 else 2]:
            expected = oracle(scores, scale, causal, mask)
            p = expected.to(dtype)  # both backward passes start from the same rounded probabilities
            wide, g = p.double(), grad.double()
            expected_grad = scale * wide * (g - (wide * g).sum(dim=-1, keepdim=True))
            for _ in backend.schedules(3):
                arguments = [t if t is None else t.to(backend.device) for t in (scores, mask, grad, p)]
                probs = backend.ops.scaled_softmax(arguments[0], scale, causal, arguments[1])
                close(probs, expected, dtype)
                grad_scores = backend.ops.scaled_softmax_backward(arguments[2], arguments[3], scale, causal)
                close(grad_scores, expected_grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_misaligned_rows(backend, close, dtype):
    wide = torch.randn(3, 2, 7, 83).to(dtype)
    views = {
        "inner slice": wide[1:, :, 1:6, 3:75],
        "transposed heads": wide.transpose(0, 1)[..., :64],
        "strided along the keys": wide.mT,
        "expanded": wide[:, :1].expand(3, 4, 7, 83),
    }
    for view in views.values():
        expected = oracle(view, 0.5, True, None)
        probs = backend.ops.scaled_softmax(view.to(backend.device), 0.5, True, None)
        close(probs, expected, dtype)
        assert probs.is_contiguous()
        p = expected.to(dtype)
        g = view.double()
        expected_grad = 0.5 * p.double() * (g - (p.double() * g).sum(dim=-1, keepdim=True))
        strided_p = torch.nn.functional.pad(p, (1, 0))[..., 1:]  # rows that start off the 16-byte grid
        for probabilities in (p, strided_p):
            grads = backend.ops.scaled_softmax_backward(
                view.to(backend.device), probabilities.to(backend.device), 0.5, True
            )
            close(grads, expected_grad, dtype)


def test_offsets_beyond_32_bits(backend, close):
    if backend.device == "cuda":
        pytest.skip("the rows that lie between would have to be there")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16].view(2, 1, 2, 8)  # memory that is never touched
    apart.copy_(torch.randn(2, 1, 2, 8))
    expected = oracle(apart, 0.5, True, None)
    close(backend.ops.scaled_softmax(apart, 0.5, True, None), expected, torch.bfloat16)
    g, p = apart.double(), apart.double()
    expected_grad = 0.5 * p * (g - (p * g).sum(dim=-1, keepdim=True))
    close(backend.ops.scaled_softmax_backward(apart, apart, 0.5, False), expected_grad, torch.bfloat16)


@pytest.mark.parametrize("length", [1, 3, 1024, 1025, 8192, 8193, 20011])
def test_any_length_sums_to_one(backend, length):
    for _ in backend.schedules(10):
        probs = backend.ops.scaled_softmax(torch.randn(1, 1, 1, length, device=backend.device), 1.0, True, None)
        assert probs.sum().item() == pytest.approx(1, abs=1e-5)


def test_extreme_scores(backend):
    inf, nan = math.inf, math.nan
    rows = torch.tensor(
        [
            [1e4, 1e4, -1e4, 0.0],  # no overflow
            [-inf, 0.0, -inf, 0.0],  # −∞ is a hidden key
            [-inf, -inf, -inf, -inf],  # nothing visible
            [0.0, nan, 0.0, 0.0],  # NaN shows
            [nan, -inf, -inf, -inf],
            [inf, 0.0, 0.0, 0.0],
            [0.0, -86.0, -100.0, -1000.0],  # down to the smallest numbers and below
        ]
    )
    probs = backend.ops.scaled_softmax(rows.view(7, 1, 1, 4).to(backend.device), 1.0, False, None).view(7, 4).cpu()
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 0]])
    torch.testing.assert_close(probs[:3], halves)
    assert probs[3].isnan().all()
    assert probs[4].isnan().any()
    assert probs[5].isnan().any()
    torch.testing.assert_close(probs[6], torch.tensor([1.0, math.exp(-86), 0, 0]), rtol=1e-5, atol=1e-40)


def test_a_hidden_nan_does_not_leak(backend):
    scores = torch.tensor([[0.0, math.nan], [0.0, math.log(3)]], device=backend.device).view(1, 1, 2, 2)
    mask = torch.tensor([[False, True], [False, False]], device=backend.device).view(1, 1, 2, 2)
    for hidden_by in ((True, None), (False, mask)):
        probs = backend.ops.scaled_softmax(scores, 1.0, *hidden_by)
        torch.testing.assert_close(probs.cpu().view(2, 2), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_gradients():
    scores = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 3, 5) < 0.3
    for causal in (False, True):
        for hidden in (None, mask):
            assert torch.autograd.gradcheck(lambda s: scaled_softmax(s, 0.7, causal, hidden), (scores,))  # noqa: B023
    outer = torch.ones_like(scores, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled_softmax(scores, 0.7), scores, outer, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_recomputation_gives_the_same_gradients():
    scores = torch.randn(2, 2, 3, 5, requires_grad=True)

    def weigh(scores: Tensor) -> Tensor:
        return scaled_softmax(scores, 0.7).square().sum()

    plain = torch.autograd.grad(weigh(scores), scores)
    again = torch.autograd.grad(checkpoint(weigh, scores, use_reentrant=False), scores)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        (torch.zeros(2, 3, 4), None, r"scores \[2, 3, 4\] +must be \[b, n, sq, sk\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4), r"mask torch.float32 \[2, 1, 4, 4\].*must be torch.bool"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(4, 4, dtype=torch.bool), r"broadcast to \[2, 3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.bool), r"give every dimension its size or 1"),
    ],
)
def test_wrong_arguments_are_told(scores, mask, message):
    with pytest.raises(LayoutError, match=message):
        scaled_softmax(scores, 1.0, True, mask)


def test_opcheck(backend):
    scores, mask = torch.randn(2, 3, 4, 5, device=backend.device), torch.rand(2, 1, 4, 5, device=backend.device) < 0.4
    torch.library.opcheck(backend.ops.scaled_softmax.default, (scores, 0.5, True, mask))
    torch.library.opcheck(backend.ops.scaled_softmax_backward.default, (scores, scores.softmax(-1), 0.5, True))
    torch.library.opcheck(torch.ops.megascratch.scaled_softmax.default, (scores.requires_grad_(), 0.5, True, mask))
