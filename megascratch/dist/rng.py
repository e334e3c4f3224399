"""Random numbers that depend on (seed, name, global index) alone, so that no layout can change them.

A counter-based generator has no state: element i of stream k is mix(k + (i + 1)·γ), SplitMix64's output function
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 5) applied to a counter. The key k
is a hash of the seed and the tensor's name; i is the index in the flattened *logical* tensor. A rank computes the
elements that it holds, and no others.

By hand: weight w of logical shape [4, 3] split by rows over tp=2. Rank 1 holds rows 2 and 3, so its element [0, 1]
has logical index 2·3 + 1 = 7, and its value is normal(key("w"), 7) on every layout.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from megascratch.dist.layout import Box, Extent, Init, extents, spec_of
from megascratch.dist.mesh import Mesh

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, name: str) -> int:
    """Return the 64-bit key of a named stream."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed & (2**64 - 1))


def random_bits(key: int, index: Tensor) -> Tensor:
    """Return 64 random bits, as int64, for each index of a stream.

    Args:
        key: from `stream_key`.
        index: int64 of any shape; equal indices give equal bits.
    """
    z = (index * _signed(_GAMMA)).add_(_signed((key + _GAMMA) % 2**64))  # int64 wraps, as the algorithm wants
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(_MIX_1))
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_MIX_2))
    return z.bitwise_xor_(_shift_right(z, 31))


def uniform(key: int, index: Tensor) -> Tensor:
    """Return float64 values in (0, 1), both ends left out, with 52 random bits, one for each index."""
    return _shift_right(random_bits(key, index), 12).double().add_(0.5).mul_(2.0**-52)


def normal(key: int, index: Tensor) -> Tensor:
    """Return standard normal float64 values, one for each index (Box–Muller on the two halves of 64 bits)."""
    bits = random_bits(key, index)
    radius = _shift_right(bits, 32).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    return bits.bitwise_and_(0xFFFFFFFF).double().mul_(2.0 * math.pi * 2.0**-32).cos_().mul_(radius)


def keep_mask(key: int, index: Tensor, dropout: float) -> Tensor:
    """Return a boolean mask that keeps each index with probability 1 − dropout."""
    return uniform(key, index) >= dropout


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
        param.zero_()
        for extent in extents(spec, mesh.spec.sizes, mesh.coords):
            param[extent.local] = _values(spec.init, stream_key(seed, spec.name), extent, spec.shape, param)


_CHUNK = 1 << 17  # elements drawn at once: a megabyte of each temporary stays in the processor's cache


def _values(init: Init, key: int, extent: Extent, shape: Sequence[int], like: Tensor) -> Tensor:
    lengths = [s.stop - s.start for s in extent.logical]
    out = torch.full(lengths, init.mean, dtype=like.dtype, device=like.device)
    if init.std:
        starts = _logical_index(extent.logical[:-1], shape[:-1], like.device).view(-1, 1) * shape[-1]
        columns = torch.arange(extent.logical[-1].start, extent.logical[-1].stop, device=like.device)
        rows_at_once = _CHUNK // lengths[-1] + 1
        for rows, start in zip(out.view(-1, lengths[-1]).split(rows_at_once), starts.split(rows_at_once)):
            rows.copy_(normal(key, start + columns).mul_(init.std).add_(init.mean))
    return out


def _logical_index(box: Box, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return, in the shape of a box of a logical tensor, each element's index in the flattened tensor (int64)."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for s, n in zip(box, shape):
        index = index.unsqueeze(-1) * n + torch.arange(s.start, s.stop, device=device)
    return index


def _signed(value: int) -> int:
    """Reinterpret 64 bits as the int64 that torch multiplies by."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Shift without dragging the sign along."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)
