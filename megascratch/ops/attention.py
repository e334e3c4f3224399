"""Causal attention: softmax(scale · Q Kᵀ) V without the [s, t] matrix, any lengths, grouped key/value heads.

The causal rule is aligned to the bottom right: with s queries against t keys, query i is token t − s + i and sees the
keys up to its own. `first_keys` says for each query where its keys begin. One number a query is enough for both uses:

    a sliding window of 2          packed documents a a a b b
    key    0 1 2 3 4               key    0 1 2 3 4
    query 0  x          first 0    query 0  x          first 0
          1  x x              0          1  x x              0
          2    x x            1          2  x x x            0
          3      x x          2          3        x          3
          4        x x        3          4        x x        3

Worked example, one head, d = 1, scale 1: queries 0, ln 3 against keys 0, 1 with values 8, 4. Query 0 sees key 0 only
→ 8; query 1 has scores 0, ln 3, so probabilities 1/4, 3/4 → 8/4 + 3 · 4/4 = 5.

On a CPU the operator runs in blocks, csrc/cpu/attention_task.h; elsewhere this module's reference does.

Legend: `s` queries, `t` keys, `b` micro-batch, `n` query heads, `k` key/value heads, `g` = n/k, `d` head dimension.
Sources: Vaswani et al. 2017, arXiv:1706.03762, equation 1; Dao 2023, arXiv:2307.08691 (backward by the log-sum-exp).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascratch.errors import LayoutError, Problem
from megascratch.ops.registry import Formula, Operator, acc_dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_keys: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend causally.

    Args:
        q: queries [s, b, n, d].
        k, v: keys and values [t, b, k, d]; n divides by k, and query head j reads key/value head j // g.
        first_keys: [b or 1, s] int64, the first key that each query sees; None for key 0. See `first_keys`.
        scale: multiplies the scores; d^-½ when left out.
        softcap: bounds the scores to ±softcap by softcap · tanh(score / softcap) (Gemma 2); 0 for none.

    Returns: [s, b, n, d] in q.dtype, contiguous; a query that sees no key gives zeros.

    Raises: LayoutError: if shapes, dtypes or devices disagree, or scale or softcap are negative.

    Backward computes the probabilities again from q, k and one number a query, the logarithm of its sum.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    _check(q, k, v, first_keys, scale, softcap)
    out, _ = torch.ops.megascratch.attention(q, k, v, first_keys, scale, softcap)
    return out


def first_keys(documents: Tensor, window: int | None = None) -> Tensor:
    """Return for each token the first that it sees, [b, s] int64, from the documents that the tokens belong to.

    Args:
        documents: [b or 1, s], a number that changes where a document begins.
        window: how many tokens a token sees at most, itself included; None for its whole document.
    """
    s = documents.shape[1]
    token = torch.arange(s, device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(begins, token, 0).cummax(dim=1).values
    return first if window is None else first.maximum(token - window + 1)


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, softcap: float) -> None:
    problems = []
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        value = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        problems.append(Problem(value, "must be [s, b, n, d] and twice [t, b, k, d]"))
    elif k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        problems.append(Problem(f"{q.shape[2]} query heads", f"must divide by the {k.shape[2]} key/value heads"))
    elif first is not None and (
        first.dtype != torch.int64
        or first.dim() != 2
        or first.shape[0] not in (1, q.shape[1])
        or first.shape[1] != len(q)
    ):
        value = f"first_keys {first.dtype} {list(first.shape)}"
        problems.append(Problem(value, f"must be int64 [b or 1, s] = [{q.shape[1]}, {len(q)}]"))
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        problems.append(Problem(f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "must be one floating-point type"))
    if len({x.device for x in (q, k, v, first) if x is not None}) > 1:
        problems.append(Problem("q, k, v, first_keys", "must be on one device"))
    if not (scale > 0 and softcap >= 0):
        problems.append(Problem(f"scale {scale}, softcap {softcap}", "must be above 0, and 0 or more"))
    if problems:
        raise LayoutError(problems, "attention")


def _probabilities(
    q: Tensor, k: Tensor, first: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities [b, n, s, t], log-sum-exp of the rows [b, n, s], and the slope of the scores' cap."""
    s, t = len(q), len(k)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    slope = torch.ones_like(scores)
    if softcap > 0:
        tangent = (scores / softcap).tanh()
        scores, slope = softcap * tangent, 1 - tangent.square()
    token, key = torch.arange(t - s, t, device=q.device).unsqueeze(1), torch.arange(t, device=q.device)
    hidden = (key > token).view(1, 1, s, t)
    if first is not None:
        hidden = hidden | (key < first.unsqueeze(-1)).unsqueeze(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp(), lse, slope


def _reference(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    wide, keys, values = _wide(q, k, v)
    probs, lse, _ = _probabilities(wide, keys, first, scale, softcap)
    out = torch.einsum("bnst,tbnd->sbnd", probs, values)
    return out.to(q.dtype).contiguous(), lse.permute(2, 0, 1).contiguous()


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in `acc_dtype`, keys and values repeated for each query head: [s or t, b, n, d]."""
    group, dtype = q.shape[2] // k.shape[2], acc_dtype(q)
    return q.to(dtype), k.to(dtype).repeat_interleave(group, dim=2), v.to(dtype).repeat_interleave(group, dim=2)


def _backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, keys, values = _wide(q, k, v)
    g = grad.to(wide.dtype)
    probs, _, slope = _probabilities(wide, keys, first, scale, softcap)
    delta = (g * out.to(wide.dtype)).sum(-1).permute(1, 2, 0).unsqueeze(-1)  # Σ probability × its gradient
    scores_grad = scale * slope * probs * (torch.einsum("sbnd,tbnd->bnst", g, values) - delta)
    grad_q = torch.einsum("bnst,tbnd->sbnd", scores_grad, keys)
    # A key/value head gets the gradients of its whole group of query heads.
    grad_k, grad_v = (
        torch.einsum("bnst,sbnd->tbnd", weights, x).unflatten(2, (k.shape[2], -1)).sum(3)
        for weights, x in ((scores_grad, wide), (probs, g))
    )
    return grad_q.to(q.dtype).contiguous(), grad_k.to(k.dtype).contiguous(), grad_v.to(v.dtype).contiguous()


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, first)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.megascratch.attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap)
    return *grads, None, None, None


ATTENTION = Operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? first, float scale, float softcap) -> (Tensor, Tensor)",
    _reference,
    _fake,
    Formula(_save, _backward),
)
ATTENTION_BACKWARD = Operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? first, float scale,"
    " float softcap) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)

OPERATORS = (ATTENTION, ATTENTION_BACKWARD)
