"""Tables of rotary positions, with the ways to stretch them to longer sequences.

Legend: `d` head dimension; pair i of a head turns by position · θ^(−2i/d) (Su et al. 2021, arXiv:2104.09864, eq. 15).
"""

import math

import torch
from torch import Tensor

from megascratch.config import ModelConfig, RopeScaling


def rotary_tables(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, *, local: bool = False
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position and pair, each [max_seq_length, d/2], computed in float64.

    Args:
        model: resolved shape; `rotary_dim`, `rope_theta`, `rope_scaling` and `max_seq_length` are read.
        dtype: of the tables; float32, or float64 for float64 models.
        device: of the tables.
        local: whether they are those of layers with a window, where the model has others for them.
    """
    pairs = torch.arange(0, model.rotary_dim, 2, dtype=torch.float64, device=device)
    local = local and model.rope_local_theta is not None
    theta = (model.rope_local_theta if local else None) or model.rope_theta
    frequencies = theta ** (-pairs / model.rotary_dim)
    scale = 1.0
    if model.rope_scaling is not None and not local:
        frequencies, scale = SCALINGS[model.rope_scaling.type](frequencies, model.rope_scaling, model)
    positions = torch.arange(model.max_seq_length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _linear(frequencies: Tensor, scaling: RopeScaling, _: ModelConfig) -> tuple[Tensor, float]:
    return frequencies / scaling.factor, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling, _: ModelConfig) -> tuple[Tensor, float]:
    """Keep wavelengths well inside the original length, divide those beyond it, blend linearly between."""
    turns = scaling.original_seq_length * frequencies / (2 * math.pi)  # full turns over the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor), 1.0


def _yarn(frequencies: Tensor, scaling: RopeScaling, model: ModelConfig) -> tuple[Tensor, float]:
    """Divide pairs that turn fewer than `beta_slow` times, keep those above `beta_fast`, ramp between."""
    dim, length = model.rotary_dim, scaling.original_seq_length

    def pair_with(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64, device=frequencies.device)
    divide = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    # Attention over a longer context is flatter: the paper's temperature, folded into q and k (section 3.4). Latent
    # attention rotates a part of them only, and multiplies its scores itself.
    scale = 1.0 if model.mla is not None else 0.1 * math.log(scaling.factor) + 1.0
    return frequencies * (1 - divide + divide / scaling.factor), scale


def _longrope(frequencies: Tensor, scaling: RopeScaling, model: ModelConfig) -> tuple[Tensor, float]:
    """Divide each pair by a factor of its own, from one set for all positions (Ding et al. 2024, section 3).

    Which set is up to `max_seq_length`, not to what a batch holds: a sequence computes the same in any company.
    """
    original = scaling.original_seq_length
    factors = scaling.long_factor if model.max_seq_length > original else scaling.short_factor
    scale = math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return frequencies / torch.tensor(factors, dtype=torch.float64, device=frequencies.device), scale


SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
