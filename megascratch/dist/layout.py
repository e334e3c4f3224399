"""How one logical tensor lies on the mesh: `ParamSpec`, `Split`, and `extents`, the only layout arithmetic there is.

A logical tensor has one name and one shape, whatever the layout. A rank holds a physical part of it. `extents` says
which: pairs of (slices of the local tensor, slices of the logical tensor), covering every real element of the local
part once. Initialisation, saving, loading, resharding, conversion and the ZeRO shards of optimizer state all read it.

By hand: gate and up projections [gate; up] of 4 rows each, fused into one weight of 8 rows, on tp=2:

    logical rows   0 1 2 3 | 4 5 6 7        Split(dim=0, axis="tp", blocks=(4, 4))
    rank 0 holds   0 1       4 5            extents: local 0:2 ↔ logical 0:2, local 2:4 ↔ logical 4:6
    rank 1 holds       2 3       6 7        extents: local 0:2 ↔ logical 2:4, local 2:4 ↔ logical 6:8

Experts [4, 6, 8] on ep=2 × tp=2 are divided along two dimensions: a rank holds [2, 3, 8], two experts' halves.

A vocabulary of 5 rows on tp=2 needs 6: `pad=1` makes the physical part of rank 1 hold rows 3, 4 and one padding row,
which no extent covers: padding is physical, never logical.

ZeRO cuts a rank's part once more, as a run of its flattened elements. The run is covered by boxes of whole rows, so the
same pairs describe it: elements 1..7 of a local [2, 4] are [0, 1:4] and [1, 0:3].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from megascratch.dist.mesh import Mesh

Box = tuple[slice, ...]  # one slice a dimension, every start and stop given


@dataclass(frozen=True)
class Split:
    """How a tensor dimension is divided along a mesh axis.

    Attributes:
        dim: tensor dimension that is divided.
        axis: name of the mesh axis.
        blocks: logical sizes of the parts that were fused along `dim`, each divided on its own; empty means one part.
        pad: physical elements after the last logical one, so that the size divides. Only without `blocks`.
    """

    dim: int
    axis: str
    blocks: tuple[int, ...] = ()
    pad: int = 0


@dataclass(frozen=True)
class Matrices:
    """The matrices that a weight [..., rows, columns] is made of, for rules that act on matrices as a whole (Muon).

    The rows are `groups` times the same sequence of parts, and matrix i is the i-th part of every group: gate and up
    of f rows each, one behind the other, are `Matrices((f, f))`; query, key and value weights, fused one key/value head
    after the other, are `Matrices((g·d, d, d), groups=k)`. Dimensions before the rows count matrices, as of experts.

    Attributes:
        parts: rows of each matrix in a group.
        groups: how often the sequence is repeated.
    """

    parts: tuple[int, ...]
    groups: int = 1

    def take(self, whole: Tensor) -> list[Tensor]:
        """Return the matrices [..., groups · part, columns] of a whole weight [..., rows, columns]."""
        grouped = whole.unflatten(-2, (self.groups, sum(self.parts)))
        return [part.flatten(-3, -2) for part in grouped.split(self.parts, dim=-2)]

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return the weight made of the given matrices: the reverse of `take`."""
        grouped = [m.unflatten(-2, (self.groups, part)) for m, part in zip(matrices, self.parts)]
        return torch.cat(grouped, dim=-2).flatten(-3, -2)


@dataclass(frozen=True)
class Init:
    """Initial values: normal with a standard deviation, or a constant when `std` is 0."""

    std: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True)
class ParamSpec:
    """How one logical parameter lies on the mesh. Attached to the parameter (`parameter`), named by its stage.

    Attributes:
        name: global name, the same on every layout and pipeline stage: `layers.17.attn.qkv.weight`.
        shape: logical shape.
        splits: how it is divided over mesh axes, each along another dimension; empty where every rank holds it whole.
        grad_axes: axes besides dp and cp over which its gradient must be summed, because each rank saw only a part of
            the tokens or heads (a norm's weight under sequence parallelism).
        tied: True for a second copy of a tensor whose first copy lies on the first pipeline stage, under the same name:
            its gradient is summed with the other's, and it is neither saved nor counted twice.
        decay: whether weight decay applies.
        init: initial values.
        matrices: what a linear layer's weight is made of; None for what is no linear map of hidden activations
            (embedding, head, norms, biases).
    """

    name: str
    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()
    grad_axes: tuple[str, ...] = ()
    tied: bool = False
    decay: bool = True
    init: Init = Init()
    matrices: Matrices | None = None

    def local_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the physical shape on one rank of a mesh with these axis sizes."""
        shape = list(self.shape)
        for split in self.splits:
            n, physical = sizes.get(split.axis, 1), shape[split.dim] + split.pad
            assert physical % n == 0 and all(b % n == 0 for b in split.blocks), f"{self.name} does not divide by {n}"
            shape[split.dim] = physical // n
        return tuple(shape)

    def is_split_over(self, axis: str) -> bool:
        """Return whether the ranks of an axis hold different parts."""
        return any(split.axis == axis for split in self.splits)

    @property
    def data_axis(self) -> str:
        """The axis of replicas that see different tokens: dp × cp, without ep where that holds different experts."""
        return "expert_data" if self.is_split_over("ep") else "data"

    def is_owner(self, mesh: Mesh) -> bool:
        """Return whether this rank's copy is the one that counts: every tensor has one owner for each of its parts.

        Replicas along dp and cp are not told apart here: who counts among them depends on how state is sharded.
        """
        return not self.tied and (self.is_split_over("tp") or mesh.tp.rank == 0)


@dataclass(frozen=True)
class Extent:
    """A box of the local tensor and the equally shaped box of the logical tensor that it holds."""

    local: Box
    logical: Box


def extents(spec: ParamSpec, sizes: Mapping[str, int], coords: Mapping[str, int]) -> list[Extent]:
    """Return where a rank's part of a tensor lies in the logical tensor.

    Args:
        spec: the tensor.
        sizes: size of each mesh axis; axes left out have size 1.
        coords: the rank's coordinate along each axis; axes left out are 0.

    Returns: extents whose local boxes are disjoint and cover all but the padding of the local part.
    """
    pairs = [[(slice(0, n), slice(0, n))] for n in spec.shape]  # of each dimension: where its parts lie
    for split in spec.splits:
        if sizes.get(split.axis, 1) > 1:
            parts = _parts(split, spec.shape[split.dim], sizes[split.axis], coords.get(split.axis, 0))
            pairs[split.dim] = list(parts)
    return [Extent(tuple(p[0] for p in box), tuple(p[1] for p in box)) for box in product(*pairs)]


def _parts(split: Split, length: int, n: int, rank: int) -> Iterator[tuple[slice, slice]]:
    """Yield (local slice, logical slice) of what rank `rank` of `n` holds of a divided dimension."""
    local_start = logical_start = 0
    for block in split.blocks or (length,):
        part = (block + split.pad) // n
        first = min(rank * part, block)
        size = min(part, block - first)  # the last ranks may hold padding alone
        if size > 0:
            start = logical_start + first
            yield slice(local_start, local_start + size), slice(start, start + size)
        local_start += part
        logical_start += block


def run_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Cover elements start ≤ i < stop of a flattened tensor with boxes, in order.

    Yields: (offset of the box within the run, box). A box is contiguous in the flattened tensor.
    """
    if start >= stop:
        return
    if not shape:
        yield 0, ()
        return
    row = math.prod(shape[1:])
    done = 0
    while start < stop:
        index, inside = divmod(start, row)
        if inside == 0 and stop - start >= row:  # as many whole rows as fit, in one box
            count = (stop - start) // row
            yield done, (slice(index, index + count), *(slice(0, n) for n in shape[1:]))
            taken = count * row
        else:
            taken = min(row - inside, stop - start)
            for offset, box in run_boxes(shape[1:], inside, inside + taken):
                yield done + offset, (slice(index, index + 1), *box)
        start += taken
        done += taken


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common box of two boxes in the same coordinates, or None where they are disjoint."""
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b))
    return common if all(s.start < s.stop for s in common) else None


def lengths(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(s.stop - s.start for s in box)


def shift(box: Box, origin: Box, target: Box) -> Box:
    """Move a box given in the coordinates of `origin`'s space to those in which `origin` is called `target`."""
    return tuple(slice(s.start - o.start + t.start, s.stop - o.start + t.start) for s, o, t in zip(box, origin, target))


def run_extents(
    spec: ParamSpec, sizes: Mapping[str, int], coords: Mapping[str, int], start: int, stop: int
) -> list[Extent]:
    """Return where a run of a rank's flattened part lies in the logical tensor.

    Args:
        spec, sizes, coords: as for `extents`.
        start, stop: the run within the flattened local part.

    Returns: extents whose local boxes are one-dimensional, relative to the run's start. A box that is several rows high
        is contiguous in the run, because the rows of the local part follow each other there.
    """
    local_shape = spec.local_shape(sizes)
    result = []
    for offset, box in run_boxes(local_shape, start, stop):
        for extent in extents(spec, sizes, coords):
            common = intersect(box, extent.local)
            if common is None:
                continue
            for piece in _contiguous_pieces(common, local_shape):
                first = offset + _flat_offset(piece, local_shape) - _flat_offset(box, local_shape)
                numel = math.prod(lengths(piece))
                result.append(Extent((slice(first, first + numel),), shift(piece, extent.local, extent.logical)))
    return result


def _flat_offset(box: Box, shape: tuple[int, ...]) -> int:
    offset = 0
    for s, n in zip(box, shape):
        offset = offset * n + s.start
    return offset


def _contiguous_pieces(box: Box, shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut a box into pieces that are one run of the flattened tensor each: all of a dimension, or one index of those
    before it. Only a padded or fused dimension that is not the first one needs more than one piece."""
    first_long = next((i for i, length in enumerate(lengths(box)) if length > 1), len(box))
    if all(s.stop - s.start == n for s, n in zip(box[first_long + 1 :], shape[first_long + 1 :])):
        yield box
        return
    for index in range(box[first_long].start, box[first_long].stop):
        yield from _contiguous_pieces((*box[:first_long], slice(index, index + 1), *box[first_long + 1 :]), shape)


def parameter(
    shape: tuple[int, ...],
    *,
    splits: tuple[Split, ...] = (),
    grad_axes: tuple[str, ...] = (),
    decay: bool = True,
    init: Init = Init(),
    matrices: Matrices | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Parameter:
    """Make this rank's part of a parameter, with its `ParamSpec` attached as `.spec`; values are set by `initialize`.

    Args:
        shape: logical shape.
        splits, grad_axes, decay, init, matrices: see `ParamSpec`.
        sizes: of the mesh axes that `splits` name; 1 when left out.
        dtype, device: of the local tensor.
    """
    spec = ParamSpec("", shape, splits, grad_axes, False, decay, init, matrices)
    values = torch.empty(spec.local_shape(sizes or {}), dtype=dtype, device=device)
    local = nn.Parameter(values, requires_grad=dtype.is_floating_point)
    local.spec = spec  # type: ignore[attr-defined]
    return local


def spec_of(param: Tensor) -> ParamSpec:
    """Return the `ParamSpec` of a parameter made by `parameter`."""
    spec = param.spec  # type: ignore[attr-defined]
    assert isinstance(spec, ParamSpec)
    return spec


def name_parameters(module: nn.Module, tied: Mapping[str, str] | None = None) -> None:
    """Give every parameter of a stage its global name: the path of its module.

    Args:
        module: the stage; its module paths are global (`layers.17`, not the stage's own count).
        tied: module path of each second copy → name of the tensor that it copies.
    """
    tied = tied or {}
    for path, param in module.named_parameters():
        name = tied.get(path, path)
        param.spec = replace(spec_of(param), name=name, tied=path in tied)  # type: ignore[attr-defined]
