"""Attention over a cache and the draw of a token: every backend against the definition in float64."""

import math

import pytest
import torch
from torch import Tensor

from megascratch.ops import attention, cached_attention, draw

RELATIVE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# t, b, n, k, d
SHAPES = {
    "grouped": (70, 3, 6, 2, 32),
    "no groups": (33, 2, 3, 3, 5),
    "wide heads": (20, 2, 2, 1, 70),
    "one of everything": (1, 1, 1, 1, 1),
    "no sequence": (3, 0, 2, 1, 4),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v and a cache's keys and values as they lie in memory, and positions."""
    t, b, n, k, d = shape
    sizes = ((1, b, n, d), (1, b, k, d), (1, b, k, d), (b, k, t, d), (b, k, t, d))
    tensors = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    tensors[3:] = [x.permute(2, 0, 1, 3) for x in tensors[3:]]
    return tensors, torch.randint(0, t, (b,))


def plain(tensors: list[Tensor], positions: Tensor, window: int, scale: float, softcap: float) -> Tensor:
    """The definition, sequence by sequence."""
    q, k, v, keys, values = (x.double() for x in tensors)
    out, group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for i, position in enumerate(positions.tolist()):
        first = max(0, position + 1 - window)
        seen = torch.cat((keys[first:position, i], k[:, i])), torch.cat((values[first:position, i], v[:, i]))
        seen_keys, seen_values = (x.repeat_interleave(group, dim=1) for x in seen)
        scores = torch.einsum("nd,tnd->nt", q[0, i], seen_keys) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
        out[0, i] = torch.einsum("nt,tnd->nd", scores.softmax(-1), seen_values)
    return out


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_query_sees_its_cache(backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    if backend.name.startswith("cuda"):
        pytest.skip("attention on a GPU is torch's own")
    for window, softcap in ((shape[0], 0.0), (5, 0.0), (shape[0], 2.0)):
        tensors, positions = inputs(shape, dtype)
        expected = plain(tensors, positions, window, 0.4, softcap)
        before = [x.clone() for x in tensors[3:]]
        out = backend.ops.cached_attention(*tensors, positions, window, 0.4, softcap)
        assert out.dtype == dtype
        error = (out.double() - expected).norm()
        assert error <= RELATIVE[dtype] * expected.norm() + 1e-6 * (dtype != torch.float64)
        rows = torch.arange(shape[1])
        for cache, old, new in zip(tensors[3:], before, tensors[1:3]):
            old[positions, rows] = new[0]
            assert torch.equal(cache, old), "one place of each sequence is written, and no other"


def test_it_is_the_attention_of_training() -> None:
    q, k, v = (torch.randn(9, 2, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    keys, values = torch.zeros(2, 9, 2, 2, 8, dtype=torch.float64)
    rows = [
        cached_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], keys, values, torch.tensor([i, i])) for i in range(9)
    ]
    torch.testing.assert_close(torch.cat(rows), attention(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [-1, 70])
def test_a_position_outside_the_cache_is_told(position: int) -> None:
    tensors, positions = inputs(SHAPES["grouped"], torch.float32)
    positions[1] = position
    with pytest.raises(RuntimeError, match="outside the cache's 70"):
        cached_attention(*tensors, positions)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("v", [1, 7, 300, 4096])
def test_a_draw_is_the_first_to_reach_its_share(backend, v: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    if backend.name.startswith("cuda"):
        pytest.skip("on a GPU torch draws")
    logits = (torch.randn(50, v, dtype=torch.float64) * 3).to(dtype)
    logits[::2, 1::3] = -math.inf
    u = torch.rand(50, dtype=torch.float64)
    u[:2] = torch.tensor([2.0**-60, 1 - 2.0**-53])
    drawn = backend.ops.draw(logits, u, 0.7).unsqueeze(1)
    probs = (logits.double() / 0.7).softmax(-1)
    reached = probs.cumsum(-1).gather(1, drawn)
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    assert (probs.gather(1, drawn) > 0).all(), "also for u next to 0 and to 1"
    assert (reached >= u.unsqueeze(1) - slack).all()
    assert (reached - probs.gather(1, drawn) < u.unsqueeze(1) + slack).all()


def test_draws_follow_their_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = draw(logits.expand(100_000, 4), torch.rand(100_000, dtype=torch.float64))
    shares = drawn.bincount(minlength=4) / 100_000
    torch.testing.assert_close(shares, logits[0].exp(), rtol=0, atol=0.006)


def test_opcheck() -> None:
    tensors, positions = inputs((7, 2, 4, 2, 8), torch.float32)
    torch.library.opcheck(torch.ops.megascratch.cached_attention.default, (*tensors, positions, 7, 0.4, 0.0))
    torch.library.opcheck(torch.ops.megascratch.draw.default, (torch.randn(3, 5), torch.rand(3).double(), 1.0))
