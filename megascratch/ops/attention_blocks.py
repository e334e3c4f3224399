"""Causal attention on a CPU: matrix products on blocks that stay in the cache, and our own rows between them.

A pair is a sample and a key/value head; its g query heads are more rows of the same products. For each block of queries
(a quarter of them, 128 at most in float32) the keys that they may see come by, 1024 at a time; what lies
after the diagonal or before every query's first key is never touched:

    queries 0 … 127     ▓                     forward    scores = Q Kᵀ        rows: exp, running maximum and sum
    queries 128 … 255   █▓                               out   += scores V
    queries 256 … 383   ██▓                   backward   scores = Q Kᵀ, g = dO Vᵀ   rows: probabilities, their gradient
    queries 384 … 511   ███▓                             dV += Pᵀ dO, dK += dSᵀ Q, dQ += dS K

torch's own fused attention runs at a fraction of the speed that these products have on a CPU. Products of bfloat16 and
float64 are torch's; those of float32 are ours, csrc/cpu/product.cpp.

Legend: `p` pairs, `r` rows = queries × g, `w` keys of a block; else as in `attention.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megascratch.ops.registry import Operator, acc_dtype

# Queries of a block by the bytes of an element, and keys: large enough for products at full speed.
_QUERIES, _KEYS = {2: 256, 4: 128, 8: 64}, 1024
# Scores at once, over as many pairs as fit: half a megabyte in float32, so that two of them stay in a core's cache.
_SCORES = 1 << 17


class _Block(NamedTuple):
    """Some queries of some pairs, and the keys [begin, end) that any of them sees."""

    pairs: slice
    queries: slice
    begin: int
    end: int
    first: Tensor | None  # [p, queries]

    def key_blocks(self) -> Iterator[slice]:
        for start in range(self.begin, self.end, _KEYS):
            yield slice(start, min(start + _KEYS, self.end))


def _query_blocks(q: Tensor, k: Tensor, first: Tensor | None) -> Iterator[_Block]:
    """Cut q [s, b, n, d] against k [t, b, k, d]."""
    (s, b, n, _), (t, _, kv, _) = q.shape, k.shape
    if first is not None:
        first = first.expand(b, s).repeat_interleave(kv, dim=0)
    # A block computes its whole square on the diagonal: at most an eighth of all scores lies there for nothing.
    n_queries = max(32, min(_QUERIES[q.element_size()], s // 4))
    n_pairs = max(1, _SCORES // max(1, n_queries * min(t, _KEYS) * n // kv))
    for pair in range(0, b * kv, n_pairs):
        pairs = slice(pair, min(pair + n_pairs, b * kv))
        for query in range(0, s, n_queries):
            queries = slice(query, min(query + n_queries, s))
            own = None if first is None else first[pairs, queries]
            yield _Block(pairs, queries, 0 if own is None else max(0, int(own.min())), t - s + queries.stop, own)


def _by_pair(x: Tensor, kv: int) -> Tensor:
    """View x [s, b, n, …] as [pairs, s, g, …]."""
    s, b, n, *rest = x.shape
    return x.contiguous().view(s, b * kv, n // kv, *rest).transpose(0, 1)


def _keys_by_pair(x: Tensor) -> Tensor:
    """View keys or values [t, b, k, d] as [pairs, t, d]."""
    return x.flatten(1, 2).transpose(0, 1)


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """Write, or add, the products a [p, m, k] · b [p, k, n] to out [p, m, n]."""
    if a.dtype == out.dtype == torch.float32:
        torch.ops.megascratch.product(out, a, b, add)
    elif add:
        out += torch.bmm(a, b)
    else:
        torch.bmm(a, b, out=out)


def _room(x: Tensor, block: _Block, group: int) -> Tensor:
    """Make room for the scores of any key block of a query block, in x's dtype."""
    n_pairs, n_queries = block.pairs.stop - block.pairs.start, block.queries.stop - block.queries.start
    return x.new_empty(n_pairs * n_queries * group * _KEYS)


def attend(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The operator `attention`."""
    if q.dtype == torch.float16:  # no product of halves is fast on a CPU
        out, lse = attend(q.float(), k.float(), v.float(), first, scale, softcap)
        return out.half(), lse
    (s, b, n, _), (t, _, kv, _) = q.shape, k.shape
    group, wide = n // kv, acc_dtype(q)
    out, lse = q.new_empty(q.shape), q.new_empty((s, b, n), dtype=wide)
    queries, outs, sums = _by_pair(q, kv), _by_pair(out, kv), _by_pair(lse, kv)
    keys, values = _keys_by_pair(k).contiguous(), _keys_by_pair(v).contiguous()
    for block in _query_blocks(q, k, first):
        here = block.pairs, block.queries
        rows = queries[here].flatten(1, 2)  # [p, r, d]
        peak = torch.full(rows.shape[:2], -torch.inf, dtype=wide)
        total, mixed = torch.zeros_like(peak), torch.zeros(rows.shape, dtype=wide)
        room = _room(q, block, group)
        for seen in block.key_blocks():
            scores = _take(room, rows, seen)
            _multiply(scores, rows, keys[block.pairs, seen].mT)
            last = t - s + block.queries.start - seen.start
            torch.ops.megascratch.attention_block(
                scores, peak, total, mixed, block.first, seen.start, last, group, scale, softcap
            )
            _multiply(mixed, scores, values[block.pairs, seen], add=True)
        sums[here] = (peak + total.log()).view(sums[here].shape)
        # The largest score counts exp(0): a total below 1 is that of a query that saw no key.
        outs[here] = mixed.div_(total.clamp_min_(1.0).unsqueeze(-1)).view(outs[here].shape)
    return out, lse


def attend_backward(
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
    """The operator `attention_backward`."""
    if q.dtype == torch.float16:
        grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
        grad_q, grad_k, grad_v = attend_backward(grad, q, k, v, out, lse, first, scale, softcap)
        return grad_q.half(), grad_k.half(), grad_v.half()
    (s, _, n, _), (t, _, kv, _) = q.shape, k.shape
    group, wide = n // kv, acc_dtype(q)
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    queries, grads, outs, sums, grad_queries = (_by_pair(x, kv) for x in (q, grad, out, lse, grad_q))
    keys, values, grad_keys, grad_values = (_keys_by_pair(x) for x in (k, v, grad_k, grad_v))
    keys, values = keys.contiguous(), values.contiguous()
    for block in _query_blocks(q, k, first):
        here, pairs = (block.pairs, block.queries), block.pairs
        rows, grad_rows = queries[here].flatten(1, 2), grads[here].flatten(1, 2)
        # Σ probability × its gradient over a row is the row of dO times that of O.
        delta = (grad_rows * outs[here].flatten(1, 2)).sum(-1, dtype=wide)
        lse_rows, grad_query_rows = sums[here].flatten(1).contiguous(), torch.zeros(rows.shape, dtype=wide)
        room, grad_room = _room(q, block, group), _room(q, block, group)
        for seen in block.key_blocks():
            scores, grad_scores = _take(room, rows, seen), _take(grad_room, rows, seen)
            _multiply(scores, rows, keys[pairs, seen].mT)
            _multiply(grad_scores, grad_rows, values[pairs, seen].mT)
            last = t - s + block.queries.start - seen.start
            torch.ops.megascratch.attention_block_backward(
                scores, grad_scores, lse_rows, delta, block.first, seen.start, last, group, scale, softcap
            )
            _multiply(grad_values[pairs, seen], scores.mT, grad_rows, add=True)
            _multiply(grad_keys[pairs, seen], grad_scores.mT, rows, add=True)
            _multiply(grad_query_rows, grad_scores, keys[pairs, seen], add=True)
        grad_queries[here] = grad_query_rows.view(grad_queries[here].shape)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _take(room: Tensor, rows: Tensor, seen: slice) -> Tensor:
    """View the beginning of the room as scores [p, r, w]."""
    shape = (*rows.shape[:2], seen.stop - seen.start)
    return room[: shape[0] * shape[1] * shape[2]].view(shape)


def _visible(scores: Tensor, first: Tensor | None, start: int, last: int, group: int) -> Tensor:
    """Return which keys of a block each row sees, broadcastable to [p, r, w]."""
    _, r, w = scores.shape
    query, column = torch.arange(r, device=scores.device) // group, torch.arange(w, device=scores.device)
    visible = (column <= last + query.unsqueeze(1)).unsqueeze(0)
    return visible if first is None else visible & (column + start >= first[:, query].unsqueeze(-1))


def _capped(scores: Tensor, scale: float, softcap: float) -> Tensor:
    x = scores.to(acc_dtype(scores)) * scale
    return softcap * (x / softcap).tanh() if softcap > 0 else x


def _block_reference(
    scores: Tensor,
    peak: Tensor,
    total: Tensor,
    out: Tensor,
    first: Tensor | None,
    start: int,
    last: int,
    group: int,
    scale: float,
    softcap: float,
) -> None:
    visible = _visible(scores, first, start, last, group)
    x = _capped(scores, scale, softcap).masked_fill(~visible, -torch.inf)
    new_peak = peak.maximum(x.amax(-1))
    nothing_seen = new_peak == -torch.inf
    shift = new_peak.masked_fill(nothing_seen, 0.0)
    probs, factor = (x - shift.unsqueeze(-1)).exp(), (peak - shift).exp().masked_fill(nothing_seen, 1.0)
    total.mul_(factor).add_(probs.sum(-1))
    out.mul_(factor.unsqueeze(-1))
    peak.copy_(new_peak)
    scores.copy_(probs)


def _block_backward_reference(
    scores: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    first: Tensor | None,
    start: int,
    last: int,
    group: int,
    scale: float,
    softcap: float,
) -> None:
    visible = _visible(scores, first, start, last, group)
    x = _capped(scores, scale, softcap)
    probs = torch.where(visible, (x - lse.unsqueeze(-1)).exp(), 0.0)
    slope = scale * (1 - (x / softcap).square()) if softcap > 0 else scale
    grad.copy_(torch.where(visible, slope * probs * (grad - delta.unsqueeze(-1)), 0.0))
    scores.copy_(probs)


def _product_reference(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    out.copy_(out + a @ b if add else a @ b)


def _nothing(*_arguments: object) -> None:
    """Fake version of an operator that returns nothing."""


_ROWS = "Tensor? first, int start, int last, int group, float scale, float softcap"
ATTENTION_BLOCK = Operator(
    f"attention_block(Tensor(a!) scores, Tensor(b!) peak, Tensor(c!) total, Tensor(d!) out, {_ROWS}) -> ()",
    _block_reference,
    _nothing,
)
ATTENTION_BLOCK_BACKWARD = Operator(
    f"attention_block_backward(Tensor(a!) scores, Tensor(b!) grad, Tensor lse, Tensor delta, {_ROWS}) -> ()",
    _block_backward_reference,
    _nothing,
)
PRODUCT = Operator("product(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()", _product_reference, _nothing)

OPERATORS = (ATTENTION_BLOCK, ATTENTION_BLOCK_BACKWARD, PRODUCT)
