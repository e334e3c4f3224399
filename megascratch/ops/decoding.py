"""Generation, a token of each sequence at a time: attention over what came before, and the draw of the next token.

*Attention.* A sequence's new key and value take their place in the cache, and its query sees the keys up to there. By
hand, one head, d = 1, scale 1, a cache of 3 places, of which a query at position 1 sees two, its own among them:

    keys 0 · ·    new key 1     query ln 3    scores 0, ln 3    probabilities 1/4, 3/4
    values 8 · ·  new value 4                                   8/4 + 3 · 4/4 = 5

*The draw.* Weights exp(logit / temperature) 2, 1, 1 and u = 0.6: the sums from the left are 2, 3, 4; 0.6 · 4 = 2.4 is
first reached by the second token.

Legend: `t` places of a cache, `b` sequences, `n` query heads, `k` key/value heads, `d` head dimension, `v` vocabulary.
"""

import math

import torch
from torch import Tensor

from megascratch.ops.registry import Operator, acc_dtype


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Put a token of each sequence into its cache, and attend from it.

    Args:
        q: queries [1, b, n, d].
        k, v: of the same tokens, [1, b, k, d]; n divides by k.
        keys, values: the cache, [t, b, k, d], with contiguous rows; it is written to.
        positions: [b] int64, where the tokens stand: below t.
        window: how many tokens a token sees, itself included; None for all before it.
        scale, softcap: as in `attention`.

    Returns: [1, b, n, d] in q.dtype. It has no gradient.

    Raises: RuntimeError: if shapes or dtypes disagree, or a position lies outside the cache.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    window = keys.shape[0] if window is None else window
    return torch.ops.megascratch.cached_attention(q, k, v, keys, values, positions, window, scale, softcap)


def draw(logits: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw a token for each row: the first that brings the sum of exp(logit / temperature) to u of the whole.

    Args:
        logits: [b, v], −∞ where a token may not be drawn; not for all of a row.
        u: [b] float64, between 0 and 1, both excluded.
        temperature: more than 0.

    Returns: [b] int64.
    """
    return torch.ops.megascratch.draw(logits, u, temperature)


def _attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    t, b, kv, d = keys.shape
    if q.device.type != "cuda" and bool(((positions < 0) | (positions >= t)).any()):
        raise RuntimeError(f"cached_attention: a position lies outside the cache's {t}")
    rows = torch.arange(b, device=q.device)
    keys[positions, rows], values[positions, rows] = k[0], v[0]
    wide = q[0].to(acc_dtype(q)).view(b, kv, q.shape[2] // kv, d)
    scores = torch.einsum("bkgd,tbkd->bkgt", wide, keys.to(wide.dtype)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    behind = positions.unsqueeze(1) - torch.arange(t, device=q.device)
    hidden = (behind < 0) | (behind >= window)
    probs = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
    return torch.einsum("bkgt,tbkd->bkgd", probs, values.to(wide.dtype)).reshape(q.shape).to(q.dtype)


def _attention_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _draw_reference(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # Never one without probability, since u > 0.
    return torch.searchsorted(cumulative, u.unsqueeze(-1) * cumulative[:, -1:]).squeeze(-1)


def _draw_fake(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


OPERATORS = (
    Operator(
        "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions,"
        " int window, float scale, float softcap) -> Tensor",
        _attention_reference,
        _attention_fake,
    ),
    Operator("draw(Tensor logits, Tensor u, float temperature) -> Tensor", _draw_reference, _draw_fake),
)
