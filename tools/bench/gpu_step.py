#!/usr/bin/env python3
"""Time whole training steps of one model on this machine's GPU (or its CPU), and write what a step costs as JSON.

    python tools/bench/gpu_step.py model.preset=llama-1b train.dtype=fp8 --out step.json

Random tokens, AdamW, no recomputation; sequence 4096, four micro-batches a step, unless overridden. The best of the
timed steps counts; utilisation is of the 16-bit peak in every dtype, causal and PaLM as in `megascratch.engine.flops`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megascratch.config import Config, load_config
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine import Engine, next_token
from megascratch.engine.meter import Meter, peak_memory_bytes

DEFAULTS = ("model.vocab_size=128256", "data.seq_length=4096", "train.micro_batch=1")
MICROBATCHES = 4


def recipe(overrides: Sequence[str]) -> Config:
    """Return the configuration of a run with four micro-batches a step."""
    sized = load_config(None, [*DEFAULTS, "train.global_batch=1024", *overrides])
    batch = f"train.global_batch={MICROBATCHES * sized.train.micro_batch}"
    return load_config(None, [*DEFAULTS, *overrides, batch])


def random_microbatch(config: Config, generator: torch.Generator) -> Microbatch:
    b, s, vocab_size = config.train.micro_batch, config.data.seq_length, config.model.vocab_size or 0
    tokens = torch.randint(vocab_size, (b, s + 1), generator=generator)
    return Microbatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=torch.ones(b, s),
        position_ids=torch.arange(s).expand(b, s),
        documents=torch.zeros(b, s, dtype=torch.int64),
        sample_ids=torch.arange(b),
    )


def measure(config: Config, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    """Train on random tokens and return the cost of the fastest timed step."""
    mesh = Mesh.serial(device)
    engine, meter = Engine(config, mesh), Meter(config, mesh)
    generator = torch.Generator().manual_seed(1)
    microbatches = [random_microbatch(config, generator).to(device) for _ in range(MICROBATCHES)]
    fastest: tuple[float, dict[str, float]] | None = None
    losses = []
    for number in range(warmup + steps):
        mesh.clock.read()
        start = time.perf_counter()
        losses.append(engine.train_step(microbatches, next_token).loss)
        phases = mesh.clock.read()
        step_s = time.perf_counter() - start
        if number >= warmup and (fastest is None or step_s < fastest[0]):
            fastest = step_s, phases
    assert fastest is not None
    return {
        "parameters": sum(param.numel() for param in engine.parameters()),
        "n_layers": config.model.n_layers,
        "preset": config.model.preset,
        "dtype": config.train.dtype,
        "seq_length": config.data.seq_length,
        "micro_batch": config.train.micro_batch,
        "microbatches": MICROBATCHES,
        **meter.values(config.train.global_batch, *fastest),
        "peak_memory_bytes": peak_memory_bytes(device),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(arguments)
    result = measure(recipe(args.overrides), torch.device(args.device), args.warmup, args.steps)
    args.out.write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
