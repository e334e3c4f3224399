"""Scaled masked softmax: attention scores to attention probabilities, any lengths.

p = softmax over the keys of scale · scores, where hidden keys count as −∞. The causal rule is aligned to the bottom
right: with sq queries against sk keys, query i sees the keys up to i + sk − sq, so that decoding one query against a
cache of sk keys sees them all.

Worked example, sq = sk = 2, scale 1, scores [[0, 9], [0, ln 3]]: query 0 sees key 0 only → [1, 0]; query 1 sees
both → [1/4, 3/4]. A query that sees no key at all gives zeros, not NaN.

Legend: `b` micro-batch, `n` heads, `sq`/`sk` query/key length.
Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascratch.errors import LayoutError, Problem
from megascratch.ops.registry import Formula, Operator, acc_dtype


def scaled_softmax(scores: Tensor, scale: float, causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """Turn attention scores into probabilities over the keys.

    Args:
        scores: [b, n, sq, sk], any strides.
        scale: multiplies the scores, usually d^-½.
        causal: hide the keys after i + sk − sq from query i.
        mask: bool, broadcastable to [b, n, sq, sk]; True hides. Adds to the causal rule.

    Returns: probabilities [b, n, sq, sk], contiguous, scores.dtype, summed in `acc_dtype(scores)`; a row with every key
    hidden is zeros.

    Raises: LayoutError: if scores are not 4-dimensional or the mask is not boolean or does not broadcast.

    Backward keeps the output alone: with g the gradient of p, the scores' gradient is scale · p (g − Σ p g).
    """
    if scores.dim() != 4:
        raise LayoutError(Problem(f"scores {list(scores.shape)}", "must be [b, n, sq, sk]"), "scaled_softmax")
    if mask is not None and not _fits(mask, scores):
        value = f"mask {mask.dtype} {list(mask.shape)} on {mask.device}"
        rule = f"must be torch.bool and broadcast to {list(scores.shape)} on {scores.device}"
        raise LayoutError(Problem(value, rule, "give every dimension its size or 1"), "scaled_softmax")
    return torch.ops.megascratch.scaled_softmax(scores, scale, causal, mask)


def _fits(mask: Tensor, scores: Tensor) -> bool:
    sizes_fit = mask.dim() == 4 and all(m in (1, full) for m, full in zip(mask.shape, scores.shape))
    return sizes_fit and mask.dtype == torch.bool and mask.device == scores.device


def _reference(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    x = scores.to(acc_dtype(scores)) * scale
    sq, sk = scores.shape[-2:]
    if causal:
        hidden = torch.ones(sq, sk, dtype=torch.bool, device=scores.device).triu(sk - sq + 1)
        x = x.masked_fill(hidden, -torch.inf)
    if mask is not None:
        x = x.masked_fill(mask, -torch.inf)
    # softmax of a row of −∞ alone is NaN; only such rows become zeros, so that a NaN among the scores still shows.
    nothing_visible = (x == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(x, dim=-1).masked_fill(nothing_visible, 0.0).to(scores.dtype)


def _fake(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape)


def _backward_reference(grad: Tensor, probs: Tensor, scale: float, causal: bool) -> Tensor:
    p, g = probs.to(acc_dtype(probs)), grad.to(acc_dtype(grad))
    return (scale * p * (g - (p * g).sum(dim=-1, keepdim=True))).to(probs.dtype)


def _backward_fake(grad: Tensor, probs: Tensor, scale: float, causal: bool) -> Tensor:
    return probs.new_empty(probs.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale, ctx.causal, _ = inputs
    ctx.save_for_backward(output)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (probs,) = ctx.saved_tensors
    return torch.ops.megascratch.scaled_softmax_backward(grad, probs, ctx.scale, ctx.causal), None, None, None


SCALED_SOFTMAX = Operator(
    "scaled_softmax(Tensor scores, float scale, bool causal, Tensor? mask) -> Tensor",
    _reference,
    _fake,
    Formula(_save, _backward),
)
SCALED_SOFTMAX_BACKWARD = Operator(
    "scaled_softmax_backward(Tensor grad, Tensor probs, float scale, bool causal) -> Tensor",
    _backward_reference,
    _backward_fake,
)

OPERATORS = (SCALED_SOFTMAX, SCALED_SOFTMAX_BACKWARD)
