"""Initial values: a rank draws its own part of each parameter, the same numbers on every layout (`ops.random`)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megascratch import ops
from megascratch.dist.layout import Box, extents, spec_of
from megascratch.dist.mesh import Mesh
from megascratch.ops.random import stream_key


@torch.no_grad()
def initialize(params: Mapping[str, Tensor], mesh: Mesh, seed: int) -> None:
    """Fill this rank's part of each parameter with the values that its `ParamSpec` prescribes; padding becomes 0.

    Args:
        params: parameters made by `layout.parameter`, any dtype; values are drawn in float64 and rounded once.
        mesh: where this rank stands.
        seed: of the run.
    """
    for param in params.values():
        spec = spec_of(param)
        own = extents(spec, mesh.spec.sizes, mesh.coords)
        parts = [param[extent.local] for extent in own]
        if sum(part.numel() for part in parts) < param.numel():
            param.zero_()
        for extent, part in zip(own, parts):
            if spec.init.std == 0:
                part.fill_(spec.init.mean)
                continue
            starts = _row_starts(extent.logical, spec.shape, param.device)
            drawn = part if part.is_contiguous() else part.new_empty(part.shape)
            ops.fill_normal(
                drawn.view(len(starts), -1), stream_key(seed, spec.name), starts, spec.init.mean, spec.init.std
            )
            if drawn is not part:
                part.copy_(drawn)


def _row_starts(box: Box, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return, for each row of a box of a logical tensor, its first element's index in the flattened tensor (int64)."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for s, n in zip(box[:-1], shape[:-1]):
        index = index.unsqueeze(-1) * n + torch.arange(s.start, s.stop, device=device)
    return index.reshape(-1) * shape[-1] + box[-1].start
