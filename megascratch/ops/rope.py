"""Rotary position embedding of queries and keys, in one call.

The r rotary dimensions of a head form r/2 pairs; pair j at position p turns by the angle p · θⱼ, whose cosine and sine
stand in a table. The d − r other dimensions pass through. *Half-rotated* pairs are (j, j + r/2), as in Llama and
GPT-NeoX; *interleaved* pairs are (2j, 2j + 1), as in the paper.

Worked example, d = r = 2, one pair, θ = π/2: at position 1 the head (3, 4) turns by 90° into (−4, 3), at position 2
into (−3, −4). A query and a key at the same distance always meet at the same angle: that is the point.

Legend: `s` sequence, `b` micro-batch, `n` query heads, `m` key heads, `d` head dimension, `r` rotary dimensions.
Source: Su et al. 2021, arXiv:2104.09864, section 3.4.
"""

from typing import Any

import torch
from torch import Tensor

from megascratch.errors import LayoutError, Problem
from megascratch.ops.registry import Formula, Operator, acc_dtype


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    offset: int = 0,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: queries [s, b, n, d], any strides.
        k: keys [s, b, m, d], any strides.
        cos: table [s_max, r/2] in `acc_dtype(q)`, r ≤ d.
        sin: likewise.
        interleaved: pairs are (2j, 2j + 1) instead of (j, j + r/2).
        offset: added to every position.
        positions: [b, s] int64, for sequences that start anew inside a sample; by default the index along s.

    Returns: q' [s, b, n, d] and k' [s, b, m, d], contiguous, in their inputs' dtypes.

    Raises:
        LayoutError: if shapes, dtypes or devices disagree, or offset + s runs past the table.
        RuntimeError: if a given position lies outside the table. On CUDA the token's rotary dimensions become NaN
            instead: looking there would stall the stream.

    Backward rotates the gradients by the negative angle. The table gets no gradient.
    """
    _check(q, k, cos, sin, offset, positions)
    return torch.ops.megascratch.rope(q, k, cos, sin, positions, offset, interleaved, False)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int, positions: Tensor | None) -> None:
    problems = []
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        problems.append(Problem(f"q {list(q.shape)}, k {list(k.shape)}", "must be [s, b, n, d] and [s, b, m, d]"))
    elif cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[3]:
        value = f"cos {list(cos.shape)}, sin {list(sin.shape)}"
        problems.append(Problem(value, f"must both be [s_max, r/2] with r ≤ d = {q.shape[3]}"))
    elif positions is None and not 0 <= offset <= cos.shape[0] - q.shape[0]:
        rule = f"must be within the table's {cos.shape[0]} positions"
        problems.append(Problem(f"positions {offset} to {offset + q.shape[0] - 1}", rule, "make a longer table"))
    elif positions is not None and (positions.shape != (q.shape[1], q.shape[0]) or positions.dtype != torch.int64):
        value = f"positions {positions.dtype} {list(positions.shape)}"
        problems.append(Problem(value, f"must be int64 [b, s] = [{q.shape[1]}, {q.shape[0]}]"))
    if k.dtype != q.dtype or {cos.dtype, sin.dtype} != {acc_dtype(q)}:
        value = f"q {q.dtype}, k {k.dtype}, cos {cos.dtype}, sin {sin.dtype}"
        problems.append(Problem(value, f"q and k must agree, and the table be {acc_dtype(q)}"))
    if len({t.device for t in (q, k, cos, sin)} | ({positions.device} if positions is not None else set())) > 1:
        problems.append(Problem("q, k, cos, sin, positions", "must be on one device"))
    if problems:
        raise LayoutError(problems, "rope")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [s, b, n, d] by cos, sin [s, b or 1, 1, r/2], in plain PyTorch."""
    r = 2 * cos.shape[-1]
    rotary, rest = x[..., :r].to(acc_dtype(x)), x[..., r:]
    if interleaved:
        x1, x2 = rotary[..., 0::2], rotary[..., 1::2]
        rotated = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        x1, x2 = rotary.chunk(2, dim=-1)
        rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def _reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if positions is None:
        at = torch.arange(offset, offset + q.shape[0], device=q.device)[:, None]  # [s, 1]
    else:
        at = positions.t() + offset  # [s, b]
        if at.device.type != "cuda" and bool(((at < 0) | (at >= cos.shape[0])).any()):
            raise RuntimeError(f"rope: a position lies outside the table's {cos.shape[0]}")
    c, s = cos[at].unsqueeze(2), sin[at].unsqueeze(2)  # [s, b or 1, 1, r/2]
    s = -s if inverse else s
    return rotate(q, c, s, interleaved), rotate(k, c, s, interleaved)


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.offset, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    grad_q, grad_k = torch.ops.megascratch.rope(
        grad_q, grad_k, cos, sin, positions, ctx.offset, ctx.interleaved, not ctx.inverse
    )
    return grad_q, grad_k, None, None, None, None, None, None


ROPE = Operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, int offset, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    _reference,
    _fake,
    Formula(_save, _backward),
)

OPERATORS = (ROPE,)
