"""Sums that have the same bits in any order, and over any number of ranks."""

import math

import pytest
import torch

from megascratch.dist import comm
from megascratch.dist.mesh import Axis, Mesh, MeshSpec
from megascratch.dist.sums import exact_sum, tree_reduce_buffer
from megascratch.dist.testing import distributed


@distributed(world=4)
def test_exact_sums_have_the_same_bits_in_any_order_and_division() -> None:
    mesh = Mesh.create(MeshSpec(tp=4), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 100, dtype=torch.float64, generator=generator)
    values *= 2.0 ** torch.randint(-40, 40, values.shape, generator=generator)
    values[1, 60:] = -values[1, :40]  # most of it cancels
    values[2] *= 1e-290
    whole = exact_sum(values, Axis("tp"))
    assert whole.tolist() == pytest.approx([math.fsum(row) for row in values.tolist()], rel=1e-15)
    parts = values[:, torch.randperm(100, generator=generator)].split([10, 0, 57, 33], dim=1)
    assert torch.equal(exact_sum(parts[mesh.rank], mesh.tp), whole)
    plain = comm.sum_over(parts[mesh.rank].sum(-1), mesh.tp)
    assert not torch.equal(plain, values.sum(-1)), "these numbers would show the order of a plain sum"
    assert exact_sum(torch.tensor([1.0, math.inf]).double(), Axis("tp")).isnan()


@distributed(world=4)
def test_a_tree_adds_neighbours_first_on_every_rank() -> None:
    mesh = Mesh.create(MeshSpec(dp=4), torch.device("cpu"))
    numbers = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)
    buffer = numbers[mesh.rank : mesh.rank + 1].clone()
    tree_reduce_buffer(buffer, mesh.dp)
    assert buffer.item() == (1e16 + 1.0) + (-1e16 + 1.0)
