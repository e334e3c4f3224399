"""Rotary tables against `transformers`, whose frequencies the published models were trained with."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megascratch.config import Config, ModelConfig, RopeScaling, resolve
from megascratch.nn.rotary import rotary_tables

HEAD_DIM, LENGTH = 64, 300

SCALINGS: dict[str, tuple[RopeScaling | None, dict[str, float | str]]] = {
    "none": (None, {"rope_type": "default"}),
    "linear": (RopeScaling(type="linear", factor=4), {"rope_type": "linear", "factor": 4.0}),
    "llama 3.1": (
        RopeScaling(type="llama3", factor=8, original_seq_length=8192, low_freq_factor=1, high_freq_factor=4),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": (
        RopeScaling(type="yarn", factor=16, original_seq_length=4096, beta_fast=32, beta_slow=1),
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers(name: str, theta: float) -> None:
    scaling, parameters = SCALINGS[name]
    model = ModelConfig(
        n_layers=1,
        hidden=2 * HEAD_DIM,
        n_heads=2,
        ffn_hidden=8,
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_length=LENGTH,
    )
    cos, sin = rotary_tables(resolve(Config(model=model)).model, torch.float64, torch.device("cpu"))
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={**parameters, "rope_theta": theta},
    )
    if name == "none":
        frequencies, scale = theta ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(LENGTH).double(), frequencies.double())
    # Theirs are float32 frequencies: 1e-7 relative, times a position of up to 300.
    torch.testing.assert_close(cos, angles.cos() * scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, angles.sin() * scale, rtol=0, atol=1e-4)
    assert cos.shape == (LENGTH, HEAD_DIM // 2)
    assert math.isclose(cos[0, 0].item(), scale, rel_tol=1e-12)
