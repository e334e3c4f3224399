#!/usr/bin/env python3
"""Time causal attention on a CPU, forward and backward: ours in blocks, torch's fused one, and whole products.

The three run in turn, several times, and the best time of each counts. Time is that of this thread's processor, so that
other work on the machine takes none of it away (it still takes cache and clock). Freed memory is kept, for all of them,
as it is when training. GFLOP/s count what a causal model needs, half of the scores and seven products forward and
backward, whatever is computed besides.

    OMP_NUM_THREADS=1 python tools/bench/attention.py
    OMP_NUM_THREADS=1 python tools/bench/attention.py --lengths 512 --heads 12 --kv-heads 4 --dtypes bf16
"""

import argparse
from collections.abc import Callable

import torch
from in_turn import best_seconds
from rich.table import Table
from torch import Tensor

from megascratch import ops
from megascratch.dist.launch import keep_freed_memory
from megascratch.log import make_console
from megascratch.nn import DTYPES
from megascratch.nn.attention import blocked_core, sdpa_core, softmax_core

# Whole products hold [b, n, s, s]: beyond this length only the two that do not are compared.
_LONGEST_WHOLE = 2048

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
COLUMNS: dict[str, Attend] = {
    "sdpa": sdpa_core,
    "softmax": softmax_core,
    "blocks": lambda q, k, v: ops.attention(q, k, v),
    "train.attention = auto": blocked_core,
}


def measure(s: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a forward and backward pass of each column."""
    b = max(1, args.tokens // s)
    q, k, v = (
        torch.randn(s, b, n, args.head_dim).to(dtype).requires_grad_()
        for n in (args.heads, args.kv_heads, args.kv_heads)
    )
    grad = torch.randn(s, b, args.heads, args.head_dim).to(dtype)

    def run(attend: Attend) -> Callable[[], None]:
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad) and None

    columns = {name: run(attend) for name, attend in COLUMNS.items() if name != "softmax" or s <= _LONGEST_WHOLE}
    return best_seconds(columns, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="a micro-batch, at least one sequence")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    console = make_console()
    table = Table(title="causal attention, forward + backward: GFLOP/s, and times the speed of torch's SDPA")
    for name in ("dtype", "length", *COLUMNS):
        table.add_column(name, justify="right")
    for dtype in args.dtypes:
        for s in args.lengths:
            seconds = measure(s, DTYPES[dtype], args)
            flops = 7 * s * s * max(1, args.tokens // s) * args.heads * args.head_dim
            cells = [
                f"{flops / seconds[name] / 1e9:.0f}  {seconds['sdpa'] / seconds[name]:.2f}×" if name in seconds else "–"
                for name in COLUMNS
            ]
            table.add_row(dtype, str(s), *cells)
            console.print(dtype, s, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
