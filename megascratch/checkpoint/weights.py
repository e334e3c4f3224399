"""A model's parameters as shards: which part of each logical tensor this rank holds, and whether it saves it."""

from collections.abc import Iterable

from torch import Tensor

from megascratch.checkpoint.format import Shard
from megascratch.dist.layout import extents, spec_of
from megascratch.dist.mesh import Mesh


def weight_shards(params: Iterable[Tensor], mesh: Mesh) -> list[Shard]:
    """Return the shards of parameters, to save or to fill.

    Args:
        params: with a `ParamSpec` each; their own storage is read and written.
        mesh: this rank's place.
    """
    return [
        Shard(
            spec.name,
            spec.shape,
            param.detach(),
            extents(spec, mesh.spec.sizes, mesh.coords),
            spec.is_owner(mesh),
            data.rank,
            data.size,
        )
        for param in params
        for spec in [spec_of(param)]
        for data in [mesh.axis(spec.data_axis)]
    ]
