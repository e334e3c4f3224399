"""Vocabulary-parallel cross-entropy against torch's, which sees the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from logical import to_local, to_logical
from torch import Tensor

from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import token_logprobs
from megascratch.nn.embedding import vocabulary_split

S, B = 5, 3
CPU = torch.device("cpu")


def _inputs(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(S, B, vocab_size, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab_size, (S, B), generator=generator)
    labels[0] = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    weights = torch.randn(S, B, dtype=torch.float64, generator=generator)
    return logits.to(dtype), labels, weights


def _ours(mesh: Mesh, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [s, b], and the gradient of their weighted sum, [s, b, v]."""
    whole, labels, weights = _inputs(vocab_size, dtype)
    # The same padding as a model's head has; large values in it must change nothing.
    split = vocabulary_split(vocab_size, mesh.tp.size)
    split = type(split)(2, split.axis, pad=split.pad)
    local = to_local(whole, split, mesh)
    n_real = min(max(vocab_size - mesh.tp.rank * local.shape[2], 0), local.shape[2])
    local[..., n_real:] = 1e4
    local.requires_grad_()
    logprobs = token_logprobs(local, labels, vocab_size, mesh.tp)
    (logprobs * weights).sum().backward()
    assert local.grad is not None and local.grad.dtype == dtype
    assert not local.grad[..., n_real:].any(), "a padding column has a gradient"
    return to_logical(logprobs, (S, B), None, mesh), to_logical(local.grad, (S, B, vocab_size), split, mesh)


def _torch(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, labels, weights = _inputs(vocab_size, dtype)
    wide = logits.to(torch.float64).requires_grad_()
    logprobs = -F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (logprobs * weights).sum().backward()
    assert wide.grad is not None
    return logprobs.detach(), wide.grad


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_one_rank_equals_torch(dtype: torch.dtype, rtol: float) -> None:
    logprobs, gradient = _ours(Mesh.serial(), 100, dtype)
    expected, expected_gradient = _torch(100, dtype)
    # Computed in float32 from half-precision logits: the result is exact to that, its gradient is rounded once.
    torch.testing.assert_close(logprobs.double(), expected, rtol=min(rtol, 2e-6), atol=1e-5 if rtol > 1e-9 else 1e-12)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-6 if rtol > 1e-9 else 1e-12)


@distributed(world=4)
def test_four_ranks_equal_torch() -> None:
    mesh = Mesh.create(MeshSpec(tp=4), CPU)
    for vocab_size in (256, 200, 100, 70, 3):  # whole parts; padding in the last; ranks of padding alone
        torch.testing.assert_close(
            _ours(mesh, vocab_size, torch.float64), _torch(vocab_size, torch.float64), rtol=1e-12, atol=1e-12
        )


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([[1]]), 3, Mesh.serial().tp)
    assert logprobs.item() == -2e4
