"""Random numbers that depend on (seed, name, global index) alone, so that no layout can change them.

A counter-based generator has no state: element i of stream k is mix(k + (i + 1)·γ), SplitMix64's output function
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 5) applied to a counter. The key k
is a hash of the seed and the tensor's name; i is the index in the flattened *logical* tensor. A rank computes the
elements that it holds, and no others.

By hand: weight w of logical shape [4, 3] split by rows over tp=2. Rank 1 holds rows 2 and 3, so its element [0, 1]
has logical index 2·3 + 1 = 7, and its value is normal(key("w"), 7) on every layout.
"""

import math

import torch
import xxhash
from torch import Tensor

from megascratch.ops.registry import Operator

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


def fill_normal(out: Tensor, key: int, starts: Tensor, mean: float, std: float) -> None:
    """Fill rows with normal numbers, mean + std · normal(key, index), computed in float64 and rounded once.

    Args:
        out: [r, n] contiguous, any floating dtype.
        key: from `stream_key`.
        starts: [r] int64, index of each row's first element; those of the others follow.

    On one device a number's bits depend on key and index alone; devices differ in the last bits of float64.
    """
    torch.ops.megascratch.fill_normal(out, _signed(key), starts, mean, std)


_CHUNK = 1 << 17  # elements drawn at once: a megabyte of each temporary stays in the processor's cache


def _fill_normal_reference(out: Tensor, key: int, starts: Tensor, mean: float, std: float) -> None:
    columns = torch.arange(out.shape[1], device=out.device)
    rows_at_once = _CHUNK // max(len(columns), 1) + 1
    for rows, start in zip(out.split(rows_at_once), starts.split(rows_at_once)):
        rows.copy_(normal(key % 2**64, start.unsqueeze(1) + columns).mul_(std).add_(mean))


def _fill_normal_fake(out: Tensor, key: int, starts: Tensor, mean: float, std: float) -> None:
    return None


def _signed(value: int) -> int:
    """Reinterpret 64 bits as the int64 that torch multiplies by."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Shift without dragging the sign along."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)


OPERATORS = (
    Operator(
        "fill_normal(Tensor(a!) out, int key, Tensor starts, float mean, float std) -> ()",
        _fill_normal_reference,
        _fill_normal_fake,
    ),
)
