import pytest
import torch

from megascratch.dist.agreement import require_agreement
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.errors import LayoutError


@distributed(world=3)
def test_a_rank_that_differs_is_named_with_the_field() -> None:
    mesh = Mesh.create(MeshSpec(dp=3), torch.device("cpu"))
    facts = {"train": {"seed": 1234, "dtype": "bf16"}, "version": "0.1.0"}
    require_agreement(facts, mesh.world)
    if mesh.rank == 2:
        facts = {"train": {"seed": 7, "dtype": "bf16"}}
    with pytest.raises(LayoutError, match=r"rank 2: train\.seed = 7 +must be 1234, as on rank 0") as caught:
        require_agreement(facts, mesh.world)
    assert [problem.value for problem in caught.value.problems] == [
        "rank 2: train.seed = 7",
        "rank 2: version = None",
    ]


def test_one_rank_agrees_with_itself() -> None:
    require_agreement({"a": 1}, Mesh.serial().world)
