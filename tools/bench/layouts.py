#!/usr/bin/env python3
"""Time a training step on several ranks of a CPU: ours and picotron's, in turn, on the same layouts, model and batch.

    python tools/bench/layouts.py --python PEERS/bin/python --picotron PICOTRON

Each contestant's ranks run in processes of their own (`layouts_rank.py`, which says how picotron is set up, and what it
needs to run on a CPU), round after round, so that a slow minute of the machine meets both. `--python` is an environment
with the same torch and `transformers`; picotron is a checkout. Arguments at the end are keys
of our recipe, for layouts that picotron does not have: `parallel.schedule=zb-h1`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from layouts_rank import CONTESTANTS, LAYOUTS
from rich.table import Table
from train_step import SHAPES

from megascratch.log import make_console

CHILD = Path(__file__).with_name("layouts_rank.py")


def run_ranks(name: str, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start a contestant's ranks, and return what the last one printed, or {"absent": why}."""
    sizes, _ = LAYOUTS[layout]
    world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1)
    python, checkout, overrides = sys.executable, args.ours, args.overrides
    if name == "picotron":
        python, checkout, overrides = args.python, args.picotron, []
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(CHILD), name, args.shape, layout, *overrides, "--steps", str(args.steps)]
        command += ["--meet", f"{folder}/store"]
        command += ["--checkout", str(checkout)] if checkout is not None else []
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        printed, errors = zip(*[rank.communicate() for rank in ranks])
    if any(rank.returncode for rank in ranks):
        return {"absent": next((error.strip().splitlines()[-1] for error in errors if error.strip()), "no reason")}
    result: dict[str, Any] = json.loads(printed[-1].splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="keys of our recipe")
    parser.add_argument("--shape", choices=SHAPES, default="16m")
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--python", default=sys.executable, help="interpreter that has picotron's needs")
    parser.add_argument("--picotron", type=Path, help="checkout of picotron")
    parser.add_argument("--ours", type=Path, help="checkout of megascratch, built, in place of the installed one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps timed a round, after the first")
    args = parser.parse_args()
    console, shape = make_console(), SHAPES[args.shape]
    n_tokens = shape.batch * shape.s
    table = Table(title=f"{args.shape}, fp32, one thread a rank: {shape.batch} × {shape.s} tokens a step")
    for column in ("layout", "ours, tokens/s", "picotron, tokens/s", "ours / picotron"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for layout in args.layouts:
        seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        absent = ""
        for number in range(args.rounds):
            for name in CONTESTANTS:
                result = run_ranks(name, layout, args)
                absent = absent or result.get("absent", "")
                seconds[name] += result.get("seconds", [])
                if "seconds" in result:
                    median, loss = statistics.median(result["seconds"]), result["loss"]
                    console.print(f"round {number + 1} {layout} {name}: {median:.3f} s a step, loss {loss:.3f}")
        rates = {name: n_tokens / statistics.median(times) if times else None for name, times in seconds.items()}
        shown = [f"{rate:,.0f}" if rate else "–" for rate in rates.values()]
        ratio = f"{rates['ours'] / rates['picotron']:.2f}" if rates["ours"] and rates["picotron"] else absent
        table.add_row(layout, *shown, ratio)
    console.print(table)


if __name__ == "__main__":
    main()
