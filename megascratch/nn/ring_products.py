"""Products that overlap with their collectives: parts travel round the ring of tp while others are multiplied.

An all-gather in front of a product makes it wait for all parts, but the first part is here already, and the next can
come while it is multiplied. Of three ranks, rank 0, which hands on to rank 1 and is handed by rank 2:

    step        0                     1                     2
    multiplies  x0 → rows of 0        x2 → rows of 2        x1 → rows of 1
    meanwhile   x0 goes, x2 comes     x2 goes, x1 comes

A reduce-scatter behind a product is the same backwards. The sum for a rank starts at the rank after it, and each adds
its own product, made while the sum was on its way:

    step        0                     1                     2
    multiplies  for rank 2            for rank 1            for rank 0, itself
    adds                              rank 2's              that of ranks 1 and 2
    hands on    the product           the sum               nothing: it stays

The products are those of smaller matrices, tp times as many, so this gains where a transfer takes longer than that
costs: between GPUs of a node, not between processes that share cores.

Legend: `s` sequence, `b` micro-batch, `k` and `n` features that a product sums over and makes.
Source: Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition", section 5.1.
"""

from torch import Tensor

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.mesh import Axis


def gathered_product(x: Tensor, right: Tensor, axis: Axis, whole: Tensor | None = None) -> Tensor:
    """Multiply what all ranks have of a sequence.

    Args:
        x: this rank's part, [s/tp, b, k].
        right: [k, n].
        axis: over which the sequence is divided.
        whole: takes the gathered sequence, [s, b, k].

    Returns: [s, b, n].
    """
    out = x.new_empty(axis.size * len(x), *x.shape[1:-1], right.shape[1])
    rows, kept = out.chunk(axis.size), None if whole is None else whole.chunk(axis.size)
    for step in range(axis.size):
        arrives = comm.pass_on(x, axis) if step + 1 < axis.size else None
        source = (axis.rank - step) % axis.size
        ops.matmul_into(rows[source].flatten(0, -2), x.flatten(0, -2), right, add=False)
        if kept is not None:
            kept[source].copy_(x)
        if arrives is not None:
            x = arrives()
    return out


def reduced_product(x: Tensor, right: Tensor, axis: Axis) -> Tensor:
    """Multiply, sum over ranks, and keep this rank's part of the sequence.

    Args:
        x: [s, b, k].
        right: [k, n].
        axis: over which the result's sequence is divided.

    Returns: [s/tp, b, n].
    """
    parts = x.chunk(axis.size)
    arrives = None
    for step in range(axis.size):
        part = parts[(axis.rank - step - 1) % axis.size]
        own = ops.matmul(part.flatten(0, -2), right).view(*part.shape[:-1], right.shape[1])
        total = own if arrives is None else own.add_(arrives())
        if step + 1 < axis.size:
            arrives = comm.pass_on(total, axis)
    return total


def gathered_weight_gradient(total: Tensor, x: Tensor, grad: Tensor, axis: Axis) -> None:
    """Add gradᵀ x to a weight's gradient, while the parts of x come.

    Args:
        total: [n, k], in the dtype of the operands or float32.
        x: this rank's part, [s/tp, b, k].
        grad: of the product with all parts, [s, b, n].
        axis: over which the sequence is divided.
    """
    rows = grad.chunk(axis.size)
    for step in range(axis.size):
        arrives = comm.pass_on(x, axis) if step + 1 < axis.size else None
        source = (axis.rank - step) % axis.size
        ops.matmul_into(total, rows[source].flatten(0, -2).t(), x.flatten(0, -2), add=True)
        if arrives is not None:
            x = arrives()
