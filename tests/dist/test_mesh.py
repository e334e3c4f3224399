import pytest
import torch

from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.errors import LayoutError


def test_tensor_parallel_ranks_are_neighbours() -> None:
    spec = MeshSpec(pp=2, dp=2, tp=2)
    assert list(spec.groups(("tp",))) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert list(spec.groups(("pp",))) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert list(spec.groups(("dp", "cp"))) == [(0, 2), (1, 3), (4, 6), (5, 7)]


def test_experts_lie_on_neighbours_along_dp() -> None:
    spec = MeshSpec(dp=4, cp=2, ep=2)
    assert list(spec.groups(("ep",))) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert list(spec.groups(("edp", "cp"))) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert list(spec.groups(("dp",))) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [spec.coords(rank)["ep"] for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("spec", [MeshSpec(), MeshSpec(pp=3, dp=2, tp=4), MeshSpec(2, 3, 5, 7)])
def test_rank_and_coordinates_are_inverse(spec: MeshSpec) -> None:
    assert [spec.rank(spec.coords(rank)) for rank in range(spec.world_size)] == list(range(spec.world_size))


@distributed(world=2)
def test_a_world_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"world size = 2 .*must be pp 1 × dp 1 × cp 1 × tp 4 = 4 .*start 4 ranks"):
        Mesh.create(MeshSpec(tp=4), torch.device("cpu"))


@distributed(world=3)
def test_the_ends_of_a_pipeline_share_an_axis() -> None:
    mesh = Mesh.create(MeshSpec(pp=3), torch.device("cpu"))
    assert mesh.ends.size == (1 if mesh.rank == 1 else 2)
