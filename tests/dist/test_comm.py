"""Every collective is a linear map A, and its gradient must be Aᵀ: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed, run_ranks

# Input and output of each map live either once, the same on every rank ("shared"), or differ by rank ("own"): an inner
# product over all ranks counts a shared tensor once.
COLLECTIVES: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "copy": (lambda x, axis, dim: comm.copy(x, axis), "shared", "own"),
    "all_reduce": (lambda x, axis, dim: comm.all_reduce(x, axis), "own", "shared"),
    "all_gather": (comm.all_gather, "own", "own"),
    "reduce_scatter": (comm.reduce_scatter, "own", "own"),
    "scatter": (comm.scatter, "shared", "own"),
    "gather": (comm.gather, "own", "shared"),
    "all_to_all": (lambda x, axis, dim: comm.all_to_all(x, axis, dim, (dim + 1) % 3), "own", "own"),
}


def _random(kind: str, shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + (rank if kind == "own" else 0))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _inner(a: Tensor, b: Tensor, kind: str, mesh: Mesh) -> Tensor:
    product = (a * b).sum()
    return comm.sum_over(product, mesh.tp) if kind == "own" else product


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", COLLECTIVES)
@distributed(world=2)
def test_gradient_is_the_adjoint(name: str, dim: int) -> None:
    mesh = Mesh.create(MeshSpec(tp=2), torch.device("cpu"))
    collective, domain, codomain = COLLECTIVES[name]
    x = _random(domain, (4, 2, 6), mesh.rank, seed=10).requires_grad_()
    before = x.detach().clone()
    ax = collective(x, mesh.tp, dim)
    y = _random(codomain, tuple(ax.shape), mesh.rank, seed=20)
    ax.backward(y)
    assert x.grad is not None
    left, right = _inner(ax.detach(), y, codomain, mesh), _inner(before, x.grad, domain, mesh)
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    assert torch.equal(x, before), "the input was changed"


@distributed(world=4)
def test_values_on_both_axes_of_a_2_by_2_mesh() -> None:
    mesh = Mesh.create(MeshSpec(pp=2, tp=2), torch.device("cpu"))
    own = torch.tensor([float(mesh.rank)])
    tp_pair, pp_pair = [2.0 * mesh.pp.rank, 2.0 * mesh.pp.rank + 1], [float(mesh.tp.rank), mesh.tp.rank + 2.0]
    assert comm.all_gather(own, mesh.tp).tolist() == tp_pair
    assert comm.all_gather(own, mesh.pp).tolist() == pp_pair
    assert comm.max_over(own, mesh.world).item() == 3
    assert comm.broadcast(own, mesh.world, source=2).item() == 2
    assert comm.reduce_scatter(torch.tensor([1.0, 10.0]) * own, mesh.tp).item() == sum(tp_pair) * (1, 10)[mesh.tp.rank]
    data = bytes(range(mesh.rank)) * 3  # rank 0 sends nothing
    assert comm.gather_bytes(data, mesh.world) == [bytes(range(rank)) * 3 for rank in range(4)]


@distributed(world=2)
def test_point_to_point_by_tag() -> None:
    mesh = Mesh.create(MeshSpec(pp=2), torch.device("cpu"))
    if mesh.pp.is_first:
        sends = [comm.isend(torch.full((3,), float(tag)), mesh.pp, 1, tag) for tag in (5, 7)]
        for send in sends:
            send.wait()
    else:
        for tag in (7, 5):
            buffer = torch.empty(3)
            comm.irecv(buffer, mesh.pp, 0, tag).wait()
            assert buffer.tolist() == [tag] * 3


def test_serial_axis_is_the_identity() -> None:
    axis = Mesh.serial().tp
    x = torch.randn(3, 2)
    for name, (collective, _, _) in COLLECTIVES.items():
        assert collective(x, axis, 0) is x, name
    assert comm.gather_bytes(b"x", axis) == [b"x"]


def _fails_on_rank_1() -> None:
    mesh = Mesh.create(MeshSpec(tp=2), torch.device("cpu"))
    if mesh.rank == 1:
        raise ValueError("deliberate")
    comm.barrier(mesh.world)


def test_the_runner_shows_the_failing_ranks_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*ValueError: deliberate"):
        run_ranks(2, _fails_on_rank_1)


def _hangs() -> None:
    import time

    time.sleep(60)


def test_the_runner_ends_a_hanging_rank() -> None:
    with pytest.raises(AssertionError, match=r"rank\(s\) \[0\] did not finish within 3 s"):
        run_ranks(1, _hangs, timeout_s=3)
