"""What is said of a step's cost, by numbers that can be worked out by hand."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megascratch.config import config_from_dict
from megascratch.dist.mesh import Mesh
from megascratch.engine.flops import token_flops
from megascratch.engine.meter import PHASES, Meter, peak_memory_bytes


def _config(**log: Any) -> Any:
    model = {"n_layers": 2, "hidden": 8, "n_heads": 2, "n_kv_heads": 1, "ffn_hidden": 16, "vocab_size": 100}
    train = {"global_batch": 4, "dtype": "fp32"}
    return config_from_dict({"model": model, "data": {"seq_length": 32}, "train": train, "log": log})


def test_operations_of_a_token_by_hand() -> None:
    """A layer has QKV 8 × 16, output 8 × 8, gate and up 8 × 32, down 16 × 8; the head is 8 × 100."""
    config = _config()
    weights = 2 * (128 + 64 + 256 + 128) + 800
    attention = 2 * 12 * 8 * 32  # 2 layers; scores and values are 2 · s · h each forward, twice that backward, × 2 FLOP
    flops = token_flops(config.model, 32)
    assert flops.palm == 6 * weights + attention
    assert flops.causal == 6 * weights + attention / 2


def test_the_published_convention_of_palm() -> None:
    """PaLM's appendix B: 6 N + 12 L H Q T a token, with N of Llama 3 8B without its embedding."""
    model = config_from_dict({"model": {"preset": "llama3-8b"}, "train": {"dtype": "bf16"}}).model
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert token_flops(model, 4096).palm == 6 * weights + 12 * 32 * 32 * 128 * 4096


def test_utilisation_in_both_conventions() -> None:
    config = _config(peak_tflops=1e-6)
    values = Meter(config, Mesh.serial()).values(4, step_s=2.0, phases={"forward": 0.5, "backward": 1.0})
    flops = token_flops(config.model, 32)
    assert values["tokens_per_s"] == 64
    assert values["mfu"] == pytest.approx(64 * flops.causal / 1e6)
    assert values["mfu_palm"] == pytest.approx(64 * flops.palm / 1e6)
    assert values["tflops_palm"] == pytest.approx(64 * flops.palm / 1e12)
    assert [values[f"{phase}_s"] for phase in PHASES] == [0, 0.5, 1.0, 0, 0]


def test_a_device_whose_peak_nobody_told_has_no_utilisation() -> None:
    values = Meter(_config(), Mesh.serial()).values(4, step_s=2.0, phases={})
    assert values["mfu"] is None and values["mfu_palm"] is None
    assert values["tflops"]


def test_peak_memory_is_at_least_what_is_held() -> None:
    block = torch.ones(50 << 20, dtype=torch.uint8)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert peak_memory_bytes(torch.device("cpu")) > 0.9 * held > block.numel()  # the kernel counts in batches
