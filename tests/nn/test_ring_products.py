"""Products taken apart equal those with whole collectives; layouts with them are in tests/engine/test_parity.py."""

import pytest
import torch

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import RankPool
from megascratch.nn.linear import column_linear, row_linear
from megascratch.nn.weight_gradients import WeightGradients


def _compare(size: int) -> None:
    """Both linear layers, forward and backward, into the optimizer's sums and without, at once and put off."""
    tp = Mesh.create(MeshSpec(tp=size), torch.device("cpu")).tp
    generator = torch.Generator().manual_seed(tp.rank)
    for linear, n_in, s in ((column_linear, 6, 2), (row_linear, 5, 2 * size)):
        x = torch.randn(s, 3, n_in, generator=generator, dtype=torch.float64)
        value = torch.randn(4, n_in, generator=generator, dtype=torch.float64)
        for kept, put_off in ((False, False), (True, False), (True, True)):
            results = []
            for overlap in (False, True):
                own, weight, later = x.clone().requires_grad_(), torch.nn.Parameter(value.clone()), WeightGradients()
                total = torch.zeros_like(value)
                if kept:
                    weight.main_grad = lambda total=total: total  # type: ignore[attr-defined]
                y = linear(own, weight, tp, True, later, overlap=overlap)
                direction = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
                if put_off:
                    with later.collect() as owed:
                        y.backward(direction)
                    assert len(owed) == 1
                    assert not total.any()
                    owed[0]()
                else:
                    y.backward(direction)
                assert (weight.grad is None) == kept
                results.append((y.detach(), own.grad, total if kept else weight.grad))
            for plain, ring in zip(*results):
                torch.testing.assert_close(ring, plain, rtol=1e-12, atol=1e-12)
    comm.barrier(tp)


@pytest.mark.parametrize("size", [2, 3])
def test_the_ring_computes_what_whole_collectives_do(size: int, pool: RankPool) -> None:
    pool.run(size, _compare, size)
