"""Memory and time of converting a checkpoint of a 7B model: 13.5 GB of random weights in bf16.

    python tools/bench/convert.py FOLDER [--layers 32] [--to hf megatron …]

FOLDER needs room for two such checkpoints. Each conversion runs in a process of its own, as `megascratch convert`, and
what it wrote is deleted when it has been measured. The peak is the process's largest resident set, Python and torch
included.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from megascratch.checkpoint.convert import write_own
from megascratch.checkpoint.source import Kind, Source
from megascratch.config import config_from_dict
from megascratch.dist.layout import Box, lengths
from megascratch.log import make_console
from megascratch.nn import parameter_specs

# Llama 2 7B (arXiv:2307.09288), with as many layers as are asked for.
SHAPE = {"hidden": 4096, "n_heads": 32, "ffn_hidden": 11008, "vocab_size": 32000, "max_seq_length": 4096}
# By name: where it begins, and the options of `megascratch convert`.
CONVERSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tp 4, pp 2": ("ours", ("--tp", "4", "--pp", "2")),
    "fp32": ("ours", ("--dtype", "fp32")),
    "hf": ("ours", ("--to", "hf")),
    "from hf": ("hf", ()),
    "megatron": ("ours", ("--to", "megatron", "--tp", "2", "--pp", "2")),
    "from megatron": ("megatron", ("--tp", "4")),
    "megatron-dist": ("ours", ("--to", "megatron-dist")),
    "from megatron-dist": ("megatron-dist", ()),
    "dcp": ("ours", ("--to", "dcp")),
}


def random_source(path: Path, n_layers: int) -> Source:
    """Return a model whose weights are random numbers, of which the same 2²⁴ serve again and again."""
    config = config_from_dict({"model": {**SHAPE, "n_layers": n_layers}, "train": {"dtype": "bf16"}})
    numbers = 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(1))
    numbers = numbers.bfloat16()

    def read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
        shape = lengths(box)
        numel = torch.Size(shape).numel()
        return numbers.roll(sum(name.encode())).repeat(-(-numel // len(numbers)))[:numel].view(shape)

    kinds = {spec.name: Kind(torch.bfloat16, spec.shape) for spec in parameter_specs(config.model)}
    return Source(path, config, kinds, read)


def make(folder: Path, n_layers: int) -> None:
    """Write the checkpoint that is converted."""
    write_own(random_source(folder, n_layers), folder / "ours", console=make_console())


def measured(source: Path, target: Path, options: tuple[str, ...]) -> tuple[float, float]:
    """Convert in a process of its own. Returns: seconds, and its peak resident memory in MB."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "megascratch", "convert", str(source), str(target), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--to", nargs="*", choices=list(CONVERSIONS), default=list(CONVERSIONS), metavar="NAME")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    try:
        # In another process: a child's peak counts that of the process that it was forked from.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(flags.folder, flags.layers))
        maker.start()
        maker.join()
        ours = flags.folder / "ours"
        size = sum(file.stat().st_size for file in ours.iterdir())
        print(f"{size / 1e9:.1f} GB")
        for name in flags.to:
            begin, options = CONVERSIONS[name]
            source, target = flags.folder / "ours", flags.folder / "out"
            if begin != "ours":
                source = flags.folder / "theirs"
                measured(ours, source, CONVERSIONS[begin][1])
            seconds, peak = measured(source, target, options)
            print(f"{name:20s} {peak:6.0f} MB {seconds:6.0f} s", flush=True)
            shutil.rmtree(target)
            shutil.rmtree(flags.folder / "theirs", ignore_errors=True)
    finally:
        shutil.rmtree(flags.folder)


if __name__ == "__main__":
    main()
