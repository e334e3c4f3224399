"""Between a rank's part of a tensor and the logical tensor, for tests that compare a layout with its one-rank self."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec, Split, extents, spec_of
from megascratch.dist.mesh import Mesh
from megascratch.nn.initialize import initialize


def fill(module: nn.Module, mesh: Mesh, seed: int = 7) -> None:
    """Give every parameter random values that no layout changes; norms and biases too, which start as constants."""
    params = dict(module.named_parameters())
    for param in params.values():
        spec = spec_of(param)
        param.spec = replace(spec, init=replace(spec.init, std=max(spec.init.std, 0.2)))  # type: ignore[attr-defined]
    initialize(params, mesh, seed)


def _as_tuple(split: Split | tuple[Split, ...] | None) -> tuple[Split, ...]:
    return (split,) if isinstance(split, Split) else split or ()


def to_local(whole: Tensor, split: Split | tuple[Split, ...] | None, mesh: Mesh) -> Tensor:
    """Return this rank's part of a tensor, padding included as zeros; a copy that takes gradients of its own."""
    spec = ParamSpec("", tuple(whole.shape), _as_tuple(split))
    local = whole.new_zeros(spec.local_shape(mesh.spec.sizes))
    for extent in extents(spec, mesh.spec.sizes, mesh.coords):
        local[extent.local] = whole.detach()[extent.logical]
    return local


def to_logical(local: Tensor, shape: tuple[int, ...], split: Split | tuple[Split, ...] | None, mesh: Mesh) -> Tensor:
    """Put the tp ranks' parts together; what is not divided must be the same on each of them."""
    local = local.detach()
    if not _as_tuple(split):
        largest, smallest = comm.max_over(local, mesh.tp), -comm.max_over(-local, mesh.tp)
        torch.testing.assert_close(largest, smallest, rtol=1e-12, atol=1e-12, msg="differs between ranks")
        return local
    whole = local.new_zeros(shape)
    for extent in extents(ParamSpec("", shape, _as_tuple(split)), mesh.spec.sizes, mesh.coords):
        whole[extent.logical] = local[extent.local]
    return comm.sum_over(whole, mesh.tp)


def logical_gradients(module: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    """Return every parameter's gradient in logical shape, summed over the axes that its spec names."""
    gradients = {}
    for name, param in module.named_parameters():
        spec = spec_of(param)
        gradient = torch.zeros_like(param) if param.grad is None else param.grad
        for axis in spec.grad_axes:
            gradient = comm.sum_over(gradient, mesh.axis(axis))
        gradients[name] = to_logical(gradient, spec.shape, spec.splits, mesh)
    return gradients
