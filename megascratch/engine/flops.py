"""Floating-point operations of a training step, for utilisation figures.

A weight of a matrix product that a token uses costs 2 operations a token forward and 4 backward. Attention costs
4·s·n·d a token and layer forward and twice that backward; a causal mask needs half of it. Two conventions follow, and
they differ:

    causal   counts the half that a causal model needs; what Megatron-LM reports
    palm     counts all of it (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)
"""

from dataclasses import dataclass

from megascratch.config import ModelConfig
from megascratch.nn.active import active_numel

# Dense 16-bit tensor-core peaks, FLOP/s, from NVIDIA's data sheets.
PEAKS = {"B200": 2250e12, "H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token, forward and backward, in both conventions."""

    causal: float
    palm: float


def token_flops(model: ModelConfig, seq_length: int) -> TokenFlops:
    """Count the operations of one token in a sequence of `seq_length`. Recompute is not counted: it is no progress."""
    weights = sum(active_numel(model).values())
    a_key = 6.0 * (model.n_layers + model.mtp_num_layers) * model.n_heads * model.attended_dims
    causal, palm = (a_key * model.seen_keys(seq_length, causal) for causal in (True, False))
    return TokenFlops(causal=6.0 * weights + causal, palm=6.0 * weights + palm)


def peak_flops(device_name: str) -> float | None:
    """Return the 16-bit peak of a GPU by its name, or None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
