"""Frozen weights in 4 bits: NF4 blocks whose scales are quantised once more (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314, section 3).

A row of the weight is cut into blocks of 64. A block keeps its largest magnitude as its scale, and of each value, over
the scale, the nearest of the sixteen quantiles of a normal distribution. The scales of a matrix, one number for 64
values, lose their mean and are kept in groups of 256 as 8-bit numbers whose steps grow with their size. So a weight
takes 4 + 8/64 + 2·32/(64·256) = 4.13 bits.

By hand, one block (0.3, −0.6, 0.1, 0): the scale is 0.6, the values over it are (0.5, −1, 0.167, 0), the nearest
quantiles (0.441, −1, 0.161, 0), codes (12, 0, 9, 7), and what comes back is (0.264, −0.6, 0.097, 0).

*On any layout.* Codes and scales are parameters like any other, and lie where the weight would: tensor-parallel ranks
hold whole blocks. Means and groups are those of the logical matrices, which ranks put together when they pack a weight.
So every layout holds the same numbers, and they are those of bitsandbytes for the matrices of Hugging Face's models.

Legend: `f` rows, `h` columns, `k` = h/64 blocks of a row; dimensions before the rows, as of experts, are `...`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megascratch.dist import comm
from megascratch.dist.layout import Matrices, extents, spec_of
from megascratch.errors import ConfigError, Problem
from megascratch.nn.placement import Placement

BLOCK = 64  # values that share a scale
_GROUP = 256  # scales that share one
# Quantiles of the normal distribution, over the largest; 0 is one of them (appendix E of the paper).
QUANTILES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _dynamic_numbers() -> list[float]:
    """Return the 256 numbers of the dynamic 8-bit type (Dettmers et al. 2022, arXiv:2110.02861, section 1.3), sorted.

    A decade below 1 has the middles of 2ⁱ equal parts, i = 6 for the largest down to 0, of either sign; and 0 and 1.
    """
    positive = [10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / 2**i) for i in range(7) for part in range(2**i)]
    return sorted([*positive, *(-x for x in positive), 0.0, 1.0])


def _nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """Return the index of the nearest of some sorted numbers, as uint8."""
    return torch.bucketize(x, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)


class PackedWeight(nn.Module):
    """A weight that does not learn, in 4 bits. It stands in the layer where the parameter stood.

    Args:
        weight: the parameter that it stands for, named; its values do not matter yet.
        placement: where that lies.

    Raises: ConfigError: if a rank's part of it is no whole number of blocks.
    """

    def __init__(self, weight: nn.Parameter, placement: Placement) -> None:
        super().__init__()
        self.spec, self.placement, device = spec_of(weight), placement, placement.device
        *rows, columns = self.spec.shape
        if weight.shape[-1] % BLOCK:
            rule = f"leaves {weight.shape[-1]} columns of {self.spec.name} on a rank, and 4-bit blocks have {BLOCK}"
            raise ConfigError(Problem("lora.base = nf4", rule, "use a smaller tp, or lora.base = full"))
        n_blocks, splits = columns // BLOCK, self.spec.splits
        self.matrices = self.spec.matrices or Matrices((rows[-1],))
        self.codes = placement.parameter(*rows, columns // 2, splits=splits, dtype=torch.uint8)
        self.scales = placement.parameter(*rows, n_blocks, splits=splits, dtype=torch.uint8)
        first_blocks, n_groups = _first_blocks(rows, n_blocks, self.matrices)
        self.groups = placement.parameter(n_groups, 2, dtype=torch.float32)
        self.requires_grad_(False)
        for name, param in self.named_parameters():
            param.spec = replace(spec_of(param), name=f"{self.spec.name}.{name}")  # type: ignore[attr-defined]
        self._quantiles, self._dynamic = (
            torch.tensor(numbers, device=device) for numbers in (QUANTILES, _dynamic_numbers())
        )
        # Of a byte, both values: the first one is in the upper half.
        self._pairs = torch.cartesian_prod(self._quantiles, self._quantiles)
        # Where a row's blocks begin among those of its matrix, and which of them are here.
        self._first = torch.empty(*self.scales.shape[:-1], 1, dtype=torch.int64)
        for extent in extents(spec_of(self.scales), *self._place()):
            self._first[extent.local[:-1]] = first_blocks[extent.logical[:-1]]
            self._columns = torch.arange(extent.logical[-1].start, extent.logical[-1].stop, device=device)
        self._first = self._first.to(device)

    def blank(self) -> nn.Parameter:
        """Return this rank's part of the weight as the parameter that it was, to be filled and packed."""
        spec = self.spec
        param = self.placement.parameter(*spec.shape, splits=spec.splits, init=spec.init, matrices=spec.matrices)
        param.spec = spec  # type: ignore[attr-defined]
        param.requires_grad_(False)
        return param

    @property
    def working_bytes(self) -> int:
        """Bytes of unpacked values at the most: in float32 twice, as they are scaled, and in the model's dtype."""
        return 2 * self.codes.numel() * (8 + self.placement.dtype.itemsize)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Take over values, [..., f, h] as this rank holds them. Every rank of tp and ep calls this."""
        blocks = weight.float().unflatten(-1, (-1, BLOCK))
        peaks = blocks.abs().amax(-1)
        codes = _nearest(blocks / peaks.clamp_min(torch.finfo(peaks.dtype).tiny).unsqueeze(-1), self._quantiles)
        pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
        self.codes.copy_((pairs[..., 0] << 4) | pairs[..., 1])
        quantised, groups = zip(*(self._in_groups(part) for part in self.matrices.take(self._logical(peaks))))
        self.groups.copy_(torch.cat(groups))
        scales = self.matrices.join(quantised)
        for extent in extents(spec_of(self.scales), *self._place()):
            self.scales[extent.local] = scales[extent.logical]

    @torch.no_grad()
    def unpacked(self) -> Tensor:
        """Return this rank's part of the weight, [..., f, h] in the model's dtype."""
        peaks, means = self.groups[(self._first + self._columns) // _GROUP].unbind(-1)
        scales = means + self._dynamic[self.scales.int()] * peaks
        values = self._pairs[self.codes.int()].flatten(-2).unflatten(-1, (-1, BLOCK))
        return (values * scales.unsqueeze(-1)).flatten(-2).to(self.placement.dtype)

    def _in_groups(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise the scales of a matrix, [..., f, k]: uint8 of that shape, and [groups, 2]: peak, mean."""
        mean = scales.mean()
        flat = (scales - mean).flatten()
        padded = nn.functional.pad(flat, (0, -len(flat) % _GROUP)).view(-1, _GROUP)
        peaks = padded.abs().amax(-1)
        codes = _nearest(padded / peaks.clamp_min(torch.finfo(peaks.dtype).tiny).unsqueeze(-1), self._dynamic)
        return codes.flatten()[: len(flat)].view_as(scales), torch.stack((peaks, mean.expand_as(peaks)), dim=-1)

    def _logical(self, scales: Tensor) -> Tensor:
        """Put together the scales of all ranks that hold other parts of the weight, [..., f, k]."""
        whole = scales.new_zeros(spec_of(self.scales).shape)
        for extent in extents(spec_of(self.scales), *self._place()):
            whole[extent.logical] = scales[extent.local]
        for axis in (self.placement.tp, self.placement.ep):
            if self.spec.is_split_over(axis.name):
                whole = comm.sum_over(whole, axis)
        return whole

    def _place(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        axes = (self.placement.tp, self.placement.ep)
        return {axis.name: axis.size for axis in axes}, {axis.name: axis.rank for axis in axes}


def _first_blocks(rows: Sequence[int], n_blocks: int, matrices: Matrices) -> tuple[Tensor, int]:
    """Return the number of each row's first block, [..., f, 1] int64, and how many groups there are.

    Blocks are counted within their matrix, and matrices begin with a group of their own.
    """
    numbers, n_groups = [], 0
    for part in matrices.take(torch.empty(*rows, 1)):
        numbers.append(n_groups * _GROUP + torch.arange(part.numel()).view(part.shape) * n_blocks)
        n_groups += -(-part.numel() * n_blocks // _GROUP)
    return matrices.join(numbers), n_groups


Weight = Tensor | PackedWeight
"""What a linear layer multiplies by."""


def values_of(weight: Weight) -> Tensor:
    """Return a weight's values."""
    return weight.unpacked() if isinstance(weight, PackedWeight) else weight


def packed_weights(modules: Iterable[nn.Module]) -> list[PackedWeight]:
    """Return the packed weights of some modules."""
    return [m for module in modules for m in module.modules() if isinstance(m, PackedWeight)]
