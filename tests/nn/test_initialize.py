"""Initial values: the same on every layout, and those that the generator gives."""

from dataclasses import replace

import pytest
import torch

from megascratch.dist.layout import Init, ParamSpec, Split, extents
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.nn.initialize import initialize
from megascratch.ops.random import normal, stream_key


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "shape"), [(0, (7, 6)), (1, (5, 7)), (1, (3, 7, 4)), (2, (2, 3, 7))])
def test_initial_values_do_not_depend_on_the_layout(tp: int, dim: int, shape: tuple[int, ...]) -> None:
    """Also where a rank's part is not in consecutive rows, or padded."""
    split = Split(dim, "tp", pad=-7 % tp)
    numel = torch.Size(shape).numel()
    whole = normal(stream_key(5, "embed.weight"), torch.arange(numel)).view(shape) * 0.02
    got = torch.zeros(shape, dtype=torch.float64)
    for rank in range(tp):
        spec = ParamSpec("embed.weight", shape, (split,), init=Init(std=0.02))
        param = torch.full(spec.local_shape({"tp": tp}), torch.nan, dtype=torch.float64)
        param.spec = spec  # type: ignore[attr-defined]
        mesh = replace(Mesh.serial(), spec=MeshSpec(tp=tp), rank=rank)
        initialize({"w": param}, mesh, seed=5)
        own = extents(spec, {"tp": tp}, {"tp": rank})
        for extent in own:
            got[extent.logical] = param[extent.local]
            param[extent.local] = 0
        assert param.count_nonzero() == 0, "padding is 0"
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-15)


def test_constants_are_constants() -> None:
    param = torch.empty(5, dtype=torch.bfloat16)
    param.spec = ParamSpec("norm.weight", (5,), (), init=Init(mean=1.0))  # type: ignore[attr-defined]
    initialize({"w": param}, Mesh.serial(), seed=5)
    assert param.tolist() == [1.0] * 5
