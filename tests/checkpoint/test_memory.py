"""Conversion holds a tensor, not the model: its peak stays the same while the model grows fourfold."""

import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from megascratch.checkpoint import convert
from megascratch.checkpoint.convert import Format, write_own
from megascratch.checkpoint.source import Kind, Source
from megascratch.config import config_from_dict
from megascratch.dist.layout import Box, lengths
from megascratch.nn import parameter_specs

SHAPE = {"hidden": 256, "n_heads": 8, "ffn_hidden": 704, "vocab_size": 8000, "max_seq_length": 2048}
LAYERS = (6, 24)
# Largest tensor, 8 MB, read, converted and on its way out; and what allocators keep.
MOST_MB = 40.0
LARGEST_MODEL_MB = 24 * (4 * 256**2 + 3 * 256 * 704) * 4 / 1e6 + 2 * 8000 * 256 * 4 / 1e6

M_MMAP_THRESHOLD = -3
CLEAR = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux, to reset the peak of resident memory")


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_is_given_back() -> Iterator[None]:
    """Have the C library return freed tensors to the system, so that what is resident is what is held."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)
    yield
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # what it would have come to by itself


def _resident(key: str) -> float:
    """Return a line of this process's status in MB: VmRSS, or VmHWM, its peak."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def _source(path: Path, n_layers: int) -> Source:
    config = config_from_dict({"model": {**SHAPE, "n_layers": n_layers}, "train": {"dtype": "fp32"}})
    kinds = {spec.name: Kind(torch.float32, spec.shape) for spec in parameter_specs(config.model)}

    def read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
        return torch.randn(lengths(box))

    return Source(path, config, kinds, read)


def _grown_mb(source: Path, target: Path, to: Format, tp: int, console: Console) -> float:
    gc.collect()
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    convert(source, target, to=to, tp=tp, console=console)
    return _resident("VmHWM") - before


@pytest.mark.parametrize("format", ["megascratch", "hf", "dcp", "megatron", "megatron-dist"])
def test_the_peak_does_not_grow_with_the_model(tmp_path: Path, console: Console, format: Format) -> None:
    """Out to each format, and back in."""
    assert LARGEST_MODEL_MB > 2 * MOST_MB
    for n_layers in LAYERS:
        folder = tmp_path / str(n_layers)
        folder.mkdir()
        ours = write_own(_source(folder, n_layers), folder / "ours", console=console)
        tp = 2 if format in ("megascratch", "megatron") else 1
        assert _grown_mb(ours, folder / "out", format, tp, console) < MOST_MB, f"out, {n_layers} layers"
        assert _grown_mb(folder / "out", folder / "in", "megascratch", 1, console) < MOST_MB, f"in, {n_layers} layers"
