#!/usr/bin/env python3
"""Time every fused operator on this machine's GPU, forward and backward, and write one row each as JSON.

    python tools/bench/gpu_ops.py --out ops.json

The cases are those of `ops.py`, at sizes that no cache holds. "copy" is the share of the bandwidth that copying a
tensor reaches in the same run: the bytes that the operator must at least move, over its time. Rows are written as they
are measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ops import adamw_columns, cases, run

from megascratch.nn import DTYPES

SHAPES = ((16384, 4096), (16384, 8192))


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time a function on its device, after two runs that warm it up."""
    seconds = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize(device)
            taken = start.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            function()
            taken = time.perf_counter() - begun
        if number >= 2:
            seconds.append(taken)
    return statistics.median(seconds)


def copy_bytes_per_s(device: torch.device, n_bytes: int, repeats: int) -> float:
    """Return how many bytes a second a copy reads and writes."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / median_seconds(lambda: target.copy_(source), device, repeats)


def rows(shapes: Sequence[tuple[int, int]], device: torch.device, repeats: int) -> Any:
    """Yield the measured rows, one an operator, shape and dtype."""
    bandwidth = copy_bytes_per_s(device, 2 * 2 * shapes[0][0] * shapes[0][1], repeats)
    for tokens, h in shapes:
        for dtype in ("bf16", "fp32"):
            columns, copied, moved = adamw_columns(tokens * h, DTYPES[dtype], compiled=False)
            timed = {"adamw": (columns["ours"], columns["eager"], copied, moved)}
            for name, case in cases(tokens, h, DTYPES[dtype]).items():
                timed[name] = (run(case.ours, case), run(case.eager, case), case.inputs[0].detach(), case.moved)
            for name, (ours, eager, first, n_moved) in timed.items():
                ours_s, eager_s = (median_seconds(function, device, repeats) for function in (ours, eager))
                n_bytes = n_moved * first.numel() * first.element_size()
                yield {
                    "operator": name,
                    "tokens": tokens,
                    "hidden": h,
                    "dtype": dtype,
                    "ours_ms": 1e3 * ours_s,
                    "eager_ms": 1e3 * eager_s,
                    "copy": n_bytes / ours_s / bandwidth,
                    "copy_bytes_per_s": bandwidth,
                }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("TOKENS", "HIDDEN"))
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    torch.set_default_device(device)
    found = []
    for row in rows([tuple(shape) for shape in args.shape or SHAPES], device, args.repeats):
        found.append(row)
        args.out.write_text(json.dumps(found), encoding="utf-8")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
