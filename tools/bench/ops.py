#!/usr/bin/env python3
"""Time every fused operator on a CPU, forward and backward: ours, eager PyTorch, and torch.compile.

The three run in turn, several times, and the best time of each counts. Time is that of this thread's processor, so that
other work on the machine takes none of it away (it still takes cache and clock). Freed memory is kept, for all of them,
as it is when training. "% of copy" compares the bytes that an operator must at least move, forward and backward, with
what copying a tensor of its input's size moves in its time.

torch.compile takes some seconds for each row the first time, and keeps what it made on disk: a part of the table that
was run once before (`--repeats 1`) comes at once. Attention has a table of its own, attention.py.

    OMP_NUM_THREADS=1 python tools/bench/ops.py
    OMP_NUM_THREADS=1 python tools/bench/ops.py --ops rms_norm swiglu --dtypes bf16 --shapes 0 1
    OMP_NUM_THREADS=1 python tools/bench/ops.py --no-compile
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from in_turn import best_seconds
from rich.table import Table
from torch import Tensor

from megascratch import ops
from megascratch.dist.launch import keep_freed_memory
from megascratch.dist.mesh import Mesh
from megascratch.log import make_console
from megascratch.nn import DTYPES, token_logprobs

EPS = 1e-5
# tokens and hidden size of the shapes: a laptop's model, a small one, a layer of a large one
SHAPES = ((1024, 384), (2048, 768), (2048, 2048))


class Case(NamedTuple):
    """An operator on inputs of one shape.

    Attributes:
        ours, eager: the operator, from `inputs` to one tensor or several.
        inputs: all that are differentiated; the first sets the size of the copy.
        moved: least bytes read and written, forward and backward, in sizes of the first input.
    """

    ours: Callable
    eager: Callable
    inputs: tuple[Tensor, ...]
    moved: float


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager_rms_norm(total, weight), total


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        c, s = (t[: len(x), None, None].to(x.dtype) for t in (cos, sin))
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)

    return rotate(q), rotate(k)


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return apply


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (ops.gelu, F.gelu),
    "gelu_tanh": (ops.gelu_tanh, gelu_tanh),
    "relu_squared": (ops.relu_squared, lambda x: F.relu(x).square()),
    "swiglu": (ops.swiglu, gated(F.silu)),
    "geglu": (ops.geglu, gated(F.gelu)),
    "geglu_tanh": (ops.geglu_tanh, gated(gelu_tanh)),
}


def cases(tokens: int, h: int, dtype: torch.dtype) -> dict[str, Case]:
    """Every operator at one shape."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    weight, bias = draw(h), draw(h)
    found = {
        "rms_norm": Case(lambda x, w: ops.rms_norm(x, w, EPS), eager_rms_norm, (draw(tokens, h), weight), 5),
        "add_rms_norm": Case(
            lambda x, r, w: ops.add_rms_norm(x, r, w, EPS),
            eager_add_rms_norm,
            (draw(tokens, h), draw(tokens, h), weight),
            8,
        ),
        "layer_norm": Case(
            lambda x, w, b: ops.layer_norm(x, w, b, EPS),
            lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
            (draw(tokens, h), weight, bias),
            5,
        ),
    }
    for name, (ours, eager) in ACTIVATIONS.items():
        is_gated = "glu" in name
        found[name] = Case(ours, eager, (draw(tokens, 4 * h if is_gated else 2 * h),), 4 if is_gated else 5)

    s, d = tokens // 4, 64
    angles = torch.rand(s, d // 2)
    cos, sin = angles.cos(), angles.sin()
    q, k = draw(s, 4, h // d, d), draw(s, 4, max(1, h // d // 3), d)
    found["rope"] = Case(
        lambda q, k: ops.rope(q, k, cos, sin), lambda q, k: eager_rope(q, k, cos, sin), (q, k), 4 * (1 + 1 / 3)
    )
    hidden = torch.ones(256, 256, dtype=torch.bool).triu(1)
    found["scaled_softmax"] = Case(
        lambda x: ops.scaled_softmax(x, 0.125),
        lambda x: (x * 0.125).masked_fill(hidden, -torch.inf).softmax(-1),
        (draw(tokens // 256, h // d, 256, 256),),
        5,
    )
    v = 16 * h
    labels = torch.randint(0, v, (tokens // 4,))
    tp = Mesh.serial().tp
    found["cross_entropy"] = Case(
        lambda x: -token_logprobs(x, labels, v, tp),
        lambda x: F.cross_entropy(x.float(), labels, reduction="none"),
        (draw(tokens // 4, v),),
        3,
    )
    return found


def run(function: Callable, case: Case) -> Callable[[], object]:
    """A forward and backward pass."""
    outputs = function(*case.inputs)
    grads = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
    return lambda: torch.autograd.grad(function(*case.inputs), case.inputs, grads)


def adamw_columns(n: int, dtype: torch.dtype, compiled: bool) -> tuple[dict[str, Callable[[], object]], Tensor, float]:
    """The update of n parameters in float32, written back in `dtype`; torch's own fused optimizer is the eager peer."""
    value, grad, exp_avg, exp_avg_sq = (torch.rand(n) for _ in range(4))
    model = None if dtype == torch.float32 else value.to(dtype)
    betas = {"beta1": 0.9, "beta2": 0.95}
    rule = {"eps": 1e-8, "weight_decay": 0.1, **betas}
    step = ops.adamw_step(*torch.tensor([1e-3, 10, 1, 1], dtype=torch.float64), **betas)
    theirs = torch.nn.Parameter(value.clone())
    theirs.grad = grad.clone()
    fused = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def torch_step() -> None:
        fused.step()
        if model is not None:
            model.copy_(theirs.detach())

    columns: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.adamw(value, grad, exp_avg, exp_avg_sq, step, model=model, **rule),
        "eager": torch_step,
    }
    if compiled:
        columns["compile"] = torch.compile(torch_step)
    return columns, value, 7 if model is None else 7.5


def squared_norm_columns(n: int, dtype: torch.dtype, compiled: bool) -> tuple[dict[str, Callable[[], object]], Tensor]:
    """The sum of squares of n gradients, as clipping needs it; it has no backward pass."""
    x = torch.randn(n).to(dtype)

    def eager() -> Tensor:
        return torch.linalg.vector_norm(x, dtype=torch.float32).square()

    columns: dict[str, Callable[[], object]] = {"ours": lambda: ops.squared_norm(x), "eager": eager}
    if compiled:
        columns["compile"] = torch.compile(eager)
    return columns, x


def columns_of(
    name: str, tokens: int, h: int, dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Callable[[], object]], Tensor, float]:
    """Return what runs in each column, the tensor whose copy is the measure, and how many of its sizes are moved."""
    if name == "adamw":
        return adamw_columns(tokens * h, dtype, compiled)
    if name == "squared_norm":
        return *squared_norm_columns(tokens * h, dtype, compiled), 1
    case = cases(tokens, h, dtype)[name]
    columns = {"ours": run(case.ours, case), "eager": run(case.eager, case)}
    if compiled:
        columns["compile"] = run(torch.compile(case.eager, dynamic=False), case)
    return columns, case.inputs[0].detach(), case.moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*cases(256, 64, torch.float32), "adamw", "squared_norm"]
    parser.add_argument("--ops", choices=names, nargs="+", default=names)
    parser.add_argument("--dtypes", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--shapes", type=int, choices=range(len(SHAPES)), nargs="+", default=range(len(SHAPES)))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    console = make_console()
    table = Table(title="forward + backward, milliseconds of one thread; peers' times over ours")
    for column in (
        "operator", "tokens × h", "dtype", "ours", "eager", "compile", "eager / ours", "compile / ours", "% of copy",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name in args.ops:
        for dtype in args.dtypes:
            for tokens, h in (SHAPES[i] for i in args.shapes):
                torch.compiler.reset()  # it gives up on a function that has met eight shapes
                columns, copied, moved = columns_of(name, tokens, h, DTYPES[dtype], not args.no_compile)
                target = torch.empty_like(copied)
                seconds = best_seconds({**columns, "copy": lambda a=target, b=copied: a.copy_(b)}, args.repeats)
                ours = seconds["ours"]
                row = (
                    name,
                    f"{tokens} × {h}",
                    dtype,
                    *(f"{1e3 * seconds[c]:.3f}" if c in seconds else "–" for c in ("ours", "eager", "compile")),
                    *(f"{seconds[c] / ours:.2f}" if c in seconds else "–" for c in ("eager", "compile")),
                    f"{50 * moved * seconds['copy'] / ours:.0f}%",
                )
                table.add_row(*row)
                console.print(*row)
    console.print(table)


if __name__ == "__main__":
    main()
