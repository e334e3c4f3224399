"""Context parallelism: attention over a sequence that is divided over the cp axis and never whole on a rank.

Legend: `s` tokens of this rank (S/cp of a sequence of S), `t` keys, `b` micro-batch, `n` query heads, `k` key/value
heads, `g` = n/k, `d` head dimension; heads are already divided by tp.

Causal attention gives late tokens more work than early ones, so the sequence is cut into 2·cp chunks and rank r takes
one early and one late one, r and 2·cp − 1 − r (zig-zag). For cp = 2 and chunks 0 1 2 3:

    rank 0 holds 0 3    rank 1 holds 1 2

    queries of rank 0 against keys of rank 1:    3 sees 1 and 2; 0 sees nothing     the late half against all
    queries of rank 1 against keys of rank 0:    1 and 2 see 0; neither sees 3      all against the early half
    queries against keys of the same rank:       causal within the local order

So every rank does the same work in every step, and no block but its own needs a mask. Three algorithms:

    ring         keys and values travel from rank to rank; partial results are merged by their log-sum-exp
                 (Liu et al. 2023, arXiv:2310.01889)
    ulysses      two all-to-alls swap a divided sequence for divided heads (Jacobs et al. 2023, arXiv:2309.14509)
    all_gather   keys and values are gathered, queries stay (Llama 3, arXiv:2407.21783, section 3.3.2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.mesh import Axis


@dataclass(frozen=True)
class Scores:
    """How the scores of queries and keys become those that the softmax sees.

    Attributes:
        scale: multiplies the products; d^-½ when left out.
        softcap: bounds scores to ±softcap by softcap · tanh(score / softcap) (Gemma 2, arXiv:2408.00118); 0 for none.
        window: how many tokens a token sees, itself included; None for all before it.
    """

    scale: float | None = None
    softcap: float = 0.0
    window: int | None = None

    def scale_of(self, q: Tensor) -> float:
        return 1.0 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale


PLAIN = Scores()
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, None, Scores], Tensor]


def token_index(length: int, cp: Axis, device: torch.device | None = None) -> Tensor:
    """Return the places in a sequence of `length` tokens of those that this rank holds, [length/cp] int64."""
    if cp.size == 1:
        return torch.arange(length, device=device)
    assert length % (2 * cp.size) == 0
    chunks = torch.arange(length, device=device).view(2 * cp.size, -1)
    return torch.cat((chunks[cp.rank], chunks[2 * cp.size - 1 - cp.rank]))


def natural_order(length: int, cp: Axis, device: torch.device) -> Tensor:
    """Return where each token of the sequence stands in the concatenation of all ranks' parts, [length] int64."""
    chunks = torch.arange(length, device=device).view(2 * cp.size, -1)
    joined = torch.cat([chunks[c] for rank in range(cp.size) for c in (rank, 2 * cp.size - 1 - rank)])
    return torch.argsort(joined)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, cp: Axis, documents: Tensor | None, core: Core, scores: Scores = PLAIN
) -> Tensor:
    """Attend while keys and values travel round the ring; the next block travels while this one is used.

    Args:
        q: [s, b, n, d]; tokens as `token_index` says.
        k, v: [s, b, k, d].
        cp: context-parallel axis, of size 2 or more.
        documents: document number of this rank's tokens, [b, s], or None for one document.
        core: unused; the blocks are computed here, because they must be merged.
        scores: what is done to scores.

    Returns: [s, b, n, d].
    """
    everyones = None
    if documents is not None:
        everyones = comm.all_gather(documents.unsqueeze(0), cp)  # [cp, b, s]
    return _Ring.apply(q, k, v, everyones, cp, scores)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, cp: Axis, documents: Tensor | None, core: Core, scores: Scores = PLAIN
) -> Tensor:
    """Swap the divided sequence for divided heads, attend over the whole sequence, and swap back.

    Arguments and result as in `ring_attention`; k must divide by cp.
    """
    order = natural_order(q.shape[0] * cp.size, cp, q.device)
    q, k, v = (comm.all_to_all(x, cp, split_dim=2, join_dim=0)[order] for x in (q, k, v))
    every = None if documents is None else comm.all_gather(documents.t(), cp)[order].t()
    places = torch.arange(q.shape[0], device=q.device)
    out = core(q, k, v, unseen(places, places, every, every, scores.window), True, None, scores)
    return comm.all_to_all(out[torch.argsort(order)], cp, split_dim=0, join_dim=2)


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, cp: Axis, documents: Tensor | None, core: Core, scores: Scores = PLAIN
) -> Tensor:
    """Gather keys and values, and attend with this rank's queries. Arguments and result as in `ring_attention`."""
    length = q.shape[0] * cp.size
    order = natural_order(length, cp, q.device)
    keys, values = comm.all_gather(k, cp)[order], comm.all_gather(v, cp)[order]
    own = token_index(length, cp, q.device)
    places = torch.arange(length, device=q.device)
    mask = (places > own.unsqueeze(1))[None, None]
    every = None if documents is None else comm.all_gather(documents.t(), cp)[order].t()
    if (further := unseen(own, places, documents, every, scores.window)) is not None:
        mask = mask | further
    return core(q, keys, values, mask, False, None, scores)


ALGORITHMS = {"ring": ring_attention, "ulysses": ulysses_attention, "all_gather": gathered_attention}


def unseen(
    queries: Tensor, keys: Tensor, query_documents: Tensor | None, key_documents: Tensor | None, window: int | None
) -> Tensor | None:
    """Return what queries must not see besides later keys, [b or 1, 1, s, t], or None where there is nothing.

    Args:
        queries, keys: places in the sequence, [s] and [t].
        query_documents, key_documents: numbers of their documents, [b, s] and [b, t], or None for one document.
        window: how many tokens a token sees, itself included, or None.
    """
    hidden = None
    if query_documents is not None and key_documents is not None:
        hidden = (query_documents.unsqueeze(2) != key_documents.unsqueeze(1)).unsqueeze(1)
    if window is not None:
        beyond = (keys <= queries.unsqueeze(1) - window)[None, None]
        hidden = beyond if hidden is None else hidden | beyond
    return hidden


class _Part(NamedTuple):
    """Which of this rank's queries meet which keys of a block, and whether causality still has to be enforced."""

    rows: slice
    columns: slice
    causal: bool


def _part(rank: int, source: int, s: int) -> _Part:
    everything, early, late = slice(0, s), slice(0, s // 2), slice(s // 2, s)
    if source == rank:
        return _Part(everything, everything, True)
    return _Part(everything, early, False) if source < rank else _Part(late, everything, False)


class _Ring(torch.autograd.Function):
    """Ring attention and its gradient: backward goes round once more, and each block's gradient travels with it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, cp: Axis, how: Scores) -> Tensor:
        s = q.shape[0]
        dtype = ops.acc_dtype(q)
        grouped = _grouped(q, k.shape[2])  # [b, k, g, s, d]
        out = torch.zeros(grouped.shape, dtype=dtype, device=q.device)
        lse = torch.full(grouped.shape[:-1], -torch.inf, dtype=dtype, device=q.device)
        block = torch.stack((k, v))
        for step in range(cp.size):
            source = (cp.rank - step) % cp.size
            arriving = comm.pass_on(block, cp) if step < cp.size - 1 else None
            part = _part(cp.rank, source, s)
            rows = part.rows
            hidden = _hidden(part, documents, cp, source, block[0], how.window)
            scores, _ = _scores(grouped[..., rows, :], block[0, part.columns], hidden, how)
            peak = scores.logsumexp(-1)
            values = block[1, part.columns].permute(1, 2, 0, 3).unsqueeze(2).to(dtype)
            partial = (scores - _finite(peak).unsqueeze(-1)).exp() @ values
            merged = torch.logaddexp(lse[..., rows], peak)
            for old, weight in ((out[..., rows, :], lse[..., rows]), (partial, peak)):
                old.mul_((weight - _finite(merged)).exp().unsqueeze(-1))
            out[..., rows, :] += partial
            lse[..., rows] = merged
            if arriving is not None:
                block = arriving()
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.cp, ctx.how = cp, how
        return _ungrouped(out).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        cp, how, s, dtype = ctx.cp, ctx.how, q.shape[0], out.dtype
        scale = how.scale_of(q)
        grouped, d_out = _grouped(q, k.shape[2]).to(dtype), _grouped(grad, k.shape[2]).to(dtype)
        delta = (d_out * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(out)
        block = torch.stack((k, v))
        d_block = torch.zeros(block.shape, dtype=dtype, device=q.device)
        for step in range(cp.size):
            source = (cp.rank - step) % cp.size
            arriving = comm.pass_on(block, cp) if step < cp.size - 1 else None
            part = _part(cp.rank, source, s)
            rows, columns = part.rows, part.columns
            keys, values = (x[columns].permute(1, 2, 0, 3).unsqueeze(2).to(dtype) for x in block)
            queries, d_rows = grouped[..., rows, :], d_out[..., rows, :]
            hidden = _hidden(part, documents, cp, source, block[0], how.window)
            scores, slope = _scores(queries, block[0, columns], hidden, how)
            probs = (scores - _finite(lse[..., rows]).unsqueeze(-1)).exp()
            d_scores = probs * (d_rows @ values.transpose(-1, -2) - delta[..., rows, :]) * scale
            if slope is not None:
                d_scores *= slope
            d_q[..., rows, :] += d_scores @ keys
            # A key/value head gets the gradients of its whole group of query heads.
            d_keys = (d_scores.transpose(-1, -2) @ queries).sum(2)
            d_values = (probs.transpose(-1, -2) @ d_rows).sum(2)
            d_block[:, columns] += torch.stack((d_keys, d_values)).permute(0, 3, 1, 2, 4)
            d_block = comm.pass_on(d_block, cp)()  # after the last step, each block's gradient is home again
            if arriving is not None:
                block = arriving()
        d_k, d_v = d_block.to(q.dtype)
        return _ungrouped(d_q).to(q.dtype), d_k, d_v, None, None, None


def _grouped(x: Tensor, n_kv_heads: int) -> Tensor:
    """Turn [s, b, n, d] into [b, k, g, s, d]."""
    s, b, n, d = x.shape
    return x.view(s, b, n_kv_heads, n // n_kv_heads, d).permute(1, 2, 3, 0, 4)


def _ungrouped(x: Tensor) -> Tensor:
    """Turn [b, k, g, s, d] into [s, b, n, d]."""
    b, k, g, s, d = x.shape
    return x.permute(3, 0, 1, 2, 4).reshape(s, b, k * g, d)


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor | None, how: Scores) -> tuple[Tensor, Tensor | None]:
    """Return scores [b, k, g, s, t] of queries [b, k, g, s, d] and keys [t, b, k, d], −inf where hidden; and the slope
    of their cap, if they have one."""
    columns = keys.permute(1, 2, 3, 0).unsqueeze(2)
    scores = (queries @ columns.to(queries.dtype)).to(ops.acc_dtype(queries)) * how.scale_of(queries)
    slope = None
    if how.softcap > 0:
        tangent = (scores / how.softcap).tanh()
        scores, slope = how.softcap * tangent, 1 - tangent.square()
    return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)), slope


def _hidden(
    part: _Part, documents: Tensor | None, cp: Axis, source: int, block: Tensor, window: int | None
) -> Tensor | None:
    """Return what queries must not see of a block [s, …] that rank `source` had, [b or 1, 1, 1, s, t], or None."""
    length = len(block) * cp.size
    queries, keys = (token_index(length, replace(cp, rank=rank), block.device) for rank in (cp.rank, source))
    queries, keys = queries[part.rows], keys[part.columns]
    own = others = None
    if documents is not None:
        own, others = documents[cp.rank][:, part.rows], documents[source][:, part.columns]
    hidden = unseen(queries, keys, own, others, window)
    if part.causal:
        later = (keys > queries.unsqueeze(1))[None, None]
        hidden = later if hidden is None else hidden | later
    return None if hidden is None else hidden.unsqueeze(1)


def _finite(lse: Tensor) -> Tensor:
    """Return 0 where nothing was seen yet, so that exp(−inf − lse) is 0 instead of NaN."""
    return lse.masked_fill(lse.isneginf(), 0.0)
