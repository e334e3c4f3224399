"""Attention over a divided sequence equals attention over the whole one, forward and backward."""

import pytest
import torch
from torch import Tensor

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn.context import ALGORITHMS, PLAIN, Scores, token_index

S, B, N, K, D = 16, 2, 4, 4, 8


def plain_core(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, drop: None = None, how: Scores = PLAIN
) -> Tensor:
    """Attention as its formula says, heads repeated: the oracle, and the core of two algorithms."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * (how.scale or q.shape[-1] ** -0.5)
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    probs = ops.scaled_softmax(scores, 1.0, causal, mask)
    return torch.einsum("bnst,tbnd->sbnd", probs, v)


def _inputs(n_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((S, B, N, D), (S, B, n_kv_heads, D), (S, B, n_kv_heads, D), (S, B, N, D))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", [PLAIN, Scores(scale=0.5, softcap=2.0, window=5)], ids=["plain", "gemma"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@distributed(world=4)
def test_every_algorithm_equals_attention_over_the_whole_sequence(algorithm: str, how: Scores, packed: bool) -> None:
    for spec in (MeshSpec(cp=4), MeshSpec(cp=2, dp=2)):
        cp = Mesh.create(spec, torch.device("cpu")).cp
        for n_kv_heads in (4, 2) if algorithm != "ulysses" or spec.cp == 2 else (4,):
            *inputs, grad = _inputs(n_kv_heads)
            documents = (torch.arange(S) // 5).expand(B, S) + torch.tensor([[0], [7]]) if packed else None
            places = torch.arange(S)
            mask = None if documents is None else (documents.unsqueeze(2) != documents.unsqueeze(1)).unsqueeze(1)
            if how.window is not None:
                beyond = places.unsqueeze(1) - places >= how.window
                mask = beyond[None, None] if mask is None else mask | beyond
            whole = [x.clone().requires_grad_() for x in inputs]
            want = plain_core(*whole, mask, True, None, how)
            want.backward(grad)

            own = token_index(S, cp)
            parts = [x[own].clone().requires_grad_() for x in inputs]
            own_documents = None if documents is None else documents[:, own]
            got = ALGORITHMS[algorithm](*parts, cp, own_documents, plain_core, how)
            got.backward(grad[own])
            torch.testing.assert_close(got, want[own], rtol=1e-12, atol=1e-12)
            for part, reference in zip(parts, whole):
                torch.testing.assert_close(part.grad, reference.grad[own], rtol=1e-12, atol=1e-12)


@distributed(world=4)
def test_the_parts_make_the_sequence_once_and_the_work_is_even() -> None:
    cp = Mesh.create(MeshSpec(cp=4), torch.device("cpu")).cp
    own = token_index(S, cp)
    assert sorted(comm.all_gather(own, cp).tolist()) == list(range(S))
    work = (own + 1).sum().view(1)  # keys that a causal query sees
    assert len(set(comm.all_gather(work, cp).tolist())) == 1


@distributed(world=2)
def test_the_ring_merges_half_precision_in_float32() -> None:
    cp = Mesh.create(MeshSpec(cp=2), torch.device("cpu")).cp
    *inputs, _ = _inputs(2)
    own = token_index(S, cp)
    want = plain_core(*inputs, None, True)[own]
    got = ALGORITHMS["ring"](*(x[own].bfloat16() for x in inputs), cp, None, plain_core)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
