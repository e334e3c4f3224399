"""Run every CUDA kernel on the host in many random schedules, and tell in how many ways each result came out.

    python tests/ops/host_schedules.py LIBRARY [DTYPE ...]     prints {"case dtype": number of distinct results}

A kernel that is right gives the same bits in every schedule; one that misses a barrier gives several. It runs in a
process of its own, because a library registers its kernels once a process.
"""

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascratch.ops import OPERATORS
from megascratch.ops.adamw import halves_of
from megascratch.ops.registry import acc_dtype, define

SEEDS = range(12)
NAMESPACE = "megascratch_cuda_host"

Outputs = Tensor | Sequence[Tensor]


def cases(ops: Any, dtype: torch.dtype) -> dict[str, Callable[[], Outputs]]:
    """Every kernel at sizes where a row takes several warps, and one where a warp takes a row."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    wide = acc_dtype(draw(1))
    # Rows in packets and, one element longer, element by element.
    row, odd, narrow = draw(3, 1288), draw(3, 1289), draw(40, 64)
    adamw = [torch.rand(3001, dtype=wide) for _ in range(4)]
    rule = torch.tensor([0.5, 1e-2, 1.0, 1.0, 1.0], dtype=torch.float64), 1.0, 0.1, 0.9, 0.95, 1e-6
    scores, labels, per_row = draw(1, 1, 2, 1100), torch.tensor([3, 2000, 1]), torch.rand(3).to(wide)
    q, table, logits = draw(3, 2, 4, 64), torch.rand(5, 32).to(wide), draw(3, 2063)

    def update() -> Outputs:
        state = [x.clone() for x in adamw]
        model = state[0].to(dtype) if dtype != wide else None
        ops.adamw(*state, model, None, *rule)
        return state if model is None else [*state, model]

    def update_halves() -> Outputs:
        value, grad, exp_avg, exp_avg_sq = adamw
        nearest, remainder = halves_of(value.float())
        state = [exp_avg.bfloat16(), exp_avg_sq.bfloat16()]
        ops.adamw(nearest, grad.bfloat16(), *state, None, remainder, *rule)
        return [nearest, remainder, *state]

    found: dict[str, Callable[[], Outputs]] = {
        "adamw": update,
        "adamw, halves": update_halves,
        "squared_norm": lambda: ops.squared_norm(draw_once),
        "cast_transpose": lambda: ops.cast_transpose(row, torch.ones(()), False),
        "rope": lambda: ops.rope(q, q[:, :, :2], table, table, None, 0, False, False),
        "scaled_softmax": lambda: ops.scaled_softmax(scores, 0.5, True, None),
        "scaled_softmax_backward": lambda: ops.scaled_softmax_backward(scores, scores, 0.5, True),
        "logit_statistics": lambda: ops.logit_statistics(logits, labels, 0, 2061),
        "logit_gradient": lambda: ops.logit_gradient(per_row, logits, labels, per_row, 0, 2061),
    }
    draw_once = draw(40000)
    for name in ("gelu", "gelu_tanh", "relu_squared", "swiglu", "geglu", "geglu_tanh"):
        grad = row[:, :644] if "glu" in name else row
        found[name] = lambda name=name: getattr(ops, name)(row)
        found[f"{name}_backward"] = lambda name=name, grad=grad: getattr(ops, f"{name}_backward")(grad, row)
    for size, x in (("", row), (", odd", odd), (", narrow", narrow)):
        h = x.shape[1]
        weight, bias, statistic = draw(h), draw(h), torch.rand(len(x), 1).to(wide)
        found |= {
            f"rms_norm{size}": lambda x=x, w=weight: ops.rms_norm(x, w, 1e-5),
            f"add_rms_norm{size}": lambda x=x, w=weight: ops.add_rms_norm(x, x, w, 1e-5),
            f"layer_norm{size}": lambda x=x, w=weight, b=bias: ops.layer_norm(x, w, b, 1e-5),
            f"rms_norm_backward{size}": lambda x=x, w=weight, r=statistic: ops.rms_norm_backward(x, x, w, r),
            f"layer_norm_backward{size}": lambda x=x, w=weight, r=statistic: ops.layer_norm_backward(x, x, w, r, r),
        }
    return found


def distinct_results(case: Callable[[], Outputs], seed_schedules: Callable[[Any], object]) -> int:
    """Count the results of a case over all seeds; each run that ends with an exception is one of its own."""
    results = set()
    for seed in SEEDS:
        seed_schedules(ctypes.c_uint64(seed))
        digest = hashlib.sha256()
        try:
            outputs = case()
            for x in (outputs,) if isinstance(outputs, Tensor) else outputs:
                digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        except RuntimeError as error:
            digest.update(f"{seed} {error}".encode())
        results.add(digest.digest())
    return len(results)


def main(library: Path, dtypes: Sequence[str]) -> None:
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for operator in OPERATORS:
        define(operator, definitions)
    torch.ops.load_library(library)
    seed_schedules = ctypes.CDLL(str(library)).megascratch_seed_schedules
    found = {}
    for dtype in dtypes:
        for name, case in cases(getattr(torch.ops, NAMESPACE), getattr(torch, dtype)).items():
            found[f"{name} {dtype}"] = distinct_results(case, seed_schedules)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["float32"])
