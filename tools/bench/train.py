#!/usr/bin/env python3
"""Time a whole training step on a CPU, forward, backward, clipping and AdamW: ours and its peers', in turn.

    python tools/bench/train.py --python PEERS/bin/python --picotron PICOTRON

Every contestant runs in a process of its own (`train_step.py`), round after round, so that a slow minute of the machine
meets them all. The peers' interpreter is an environment with the same torch and `transformers`, `litgpt`, `torchtitan`
and `triton`; picotron is a checkout. What is not there is one line under the table. Same shape, same tokens, same
optimizer; see `train_step.py` for how each is set up. Model FLOPs count six for each weight that is multiplied and each
token, and the half of attention's scores that a causal model needs.

A step is the median of those after the first. Training starts when all is imported: `build` is making the model and its
optimizer, `first` the step that follows, `more` how much longer the two took than a step. The peak of memory is that
of the whole process.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table
from train_step import CONTESTANTS, SHAPES, Shape

from megascratch.log import make_console

OURS = ("ours", "ours-remainder", "ours-pure")
IN_BF16 = OURS[1:]  # what differs from `ours` in bf16 alone
COLUMNS = ("s a step", "tokens a s", "GFLOP a s", "best peer / this", "build, s", "first, s", "more, s", "peak MiB")
CHILD = Path(__file__).with_name("train_step.py")


def token_flops(shape: Shape) -> int:
    """Return the model FLOPs of one token, forward and backward."""
    head_dim = shape.hidden // shape.n_heads
    attention = shape.hidden * head_dim * 2 * (shape.n_heads + shape.n_kv_heads)
    weights = shape.n_layers * (attention + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden
    return 6 * weights + 6 * shape.n_layers * shape.s * shape.hidden


def run_child(name: str, shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a contestant's process printed, or {"absent": why}."""
    python = sys.executable if name in OURS else args.python
    command = [python, str(CHILD), name, shape, dtype, "--steps", str(args.steps), "--threads", str(args.threads)]
    checkout = {**dict.fromkeys(OURS, args.ours), "picotron": args.picotron}.get(name)
    command += ["--checkout", str(checkout)] if checkout is not None else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return {"absent": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def compare(shape: str, dtype: str, args: argparse.Namespace, console: Any) -> None:
    """Print one table: every contestant at one shape and dtype."""
    runs: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    for number in range(args.rounds):
        for name in args.contestants:
            if name in absent or (dtype != "bf16" and name in IN_BF16):
                continue
            result = run_child(name, shape, dtype, args)
            if "absent" in result:
                absent[name] = result["absent"]
                continue
            runs.setdefault(name, []).append(result)
            console.print(
                f"round {number + 1} {shape} {dtype} {name}: {statistics.median(result['seconds'][1:]):.3f} s a step"
            )
    size = SHAPES[shape]
    n_tokens = size.batch * size.s
    median = {name: statistics.median(s for r in results for s in r["seconds"][1:]) for name, results in runs.items()}
    peers = [seconds for name, seconds in median.items() if name not in OURS]
    title = f"{shape}, {dtype}, {args.threads} threads: {size.batch} × {size.s} tokens a step"
    table = Table(title=title, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, results in runs.items():
        build, first, peak = (
            statistics.median(values)
            for values in zip(*((run["build_s"], run["seconds"][0], run["peak_mib"]) for run in results))
        )
        table.add_row(
            name,
            f"{median[name]:.3f}",
            f"{n_tokens / median[name]:,.0f}",
            f"{n_tokens * token_flops(size) / median[name] / 1e9:.0f}",
            f"{min(peers) / median[name]:.2f}" if peers else "–",
            f"{build:.2f}",
            f"{first:.2f}",
            f"{build + first - median[name]:.2f}",
            f"{peak:,.0f}",
        )
    console.print(table)
    for name, why in absent.items():
        console.print(f"{name} is not here: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--dtypes", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--contestants", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--picotron", type=Path, help="checkout of picotron")
    parser.add_argument("--ours", type=Path, help="checkout of megascratch, built, in place of the installed one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps timed a round, after the first")
    args = parser.parse_args()
    console = make_console()
    for shape in args.shapes:
        for dtype in args.dtypes:
            compare(shape, dtype, args, console)


if __name__ == "__main__":
    main()
