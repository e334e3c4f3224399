"""Causal self-attention with grouped key/value heads, divided over tp by heads.

Legend: `s` sequence (queries), `t` keys, `b` micro-batch, `h` hidden, `n` query heads, `k` key/value heads,
`g` = n/k query heads a group, `d` head dimension. Head counts inside a rank are already divided by tp.

The QKV product is one weight whose rows are grouped by key/value head, [q … q, k, v] for each group, so that tp divides
it by whole groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.dist.layout import Matrices
from megascratch.nn.context import ALGORITHMS, PLAIN, Scores, unseen
from megascratch.nn.linear import ColumnParallelLinear, RowParallelLinear
from megascratch.nn.norm import HeadsRMSNorm, rms_norm
from megascratch.nn.placement import Placement
from megascratch.nn.sequence import Dropout, SequenceInfo

Drop = Callable[[Tensor], Tensor]
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, Drop | None, Scores], Tensor]


@dataclass
class LayerCache:
    """Keys and values of one layer's past tokens, each [t_max, b, k, d]; the one value that generation mutates.

    A sequence's token lies at its own position, whatever the lengths of the others. What stands behind its last token
    is finite and of no meaning: no query sees it, and the next token overwrites it. In memory, the tokens of a sequence
    and head follow each other, as a decoding step reads them.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, t_max: int, b: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> "LayerCache":
        """Return room for keys and values of the given [k, d], of a tensor's dtype and on its device."""
        return cls(*(like.new_zeros(b, k, t_max, d).permute(2, 0, 1, 3) for k, d in shapes))

    def extend(self, k: Tensor, v: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Write k, v [s, b, k, d] at their tokens' positions, and return all up to the last of them, [t, b, k, d]."""
        end = info.n_cached or info.offset + k.shape[0]
        assert end <= self.keys.shape[0], f"cache of {self.keys.shape[0]} tokens cannot hold {end}"
        if info.positions is None:
            self.keys[info.offset : end], self.values[info.offset : end] = k, v
        else:
            place = info.positions.t(), torch.arange(k.shape[1], device=k.device)
            self.keys[place], self.values[place] = k, v
        return self.keys[:end], self.values[:end]

    def select(self, rows: Tensor, n_used: int, length: int) -> "LayerCache":
        """Return a cache for `length` tokens of the given rows, [a] int64, of which `n_used` are taken over."""

        both = self.keys, self.values
        selected = LayerCache.of(length, len(rows), [(x.shape[2], x.shape[3]) for x in both], self.keys)
        for new, old in zip((selected.keys, selected.values), both):
            new[:n_used] = old[:n_used].index_select(1, rows)
        return selected


def softmax_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    drop: Drop | None = None,
    how: Scores = PLAIN,
) -> Tensor:
    """Attend by two batched products with the fused softmax between them.

    Args:
        q: [s, b, n, d].
        k, v: [t, b, k, d].
        mask: True where a query must not see a key, [b or 1, 1, s, t], or None.
        causal: hide later keys, query i being token t − s + i.
        drop: applied to the probabilities [b, n, s, t], or None.
        how: scale and cap of the scores; what a window hides stands in the mask.

    Returns: [s, b, n, d].
    """
    s, b, n, d = q.shape
    t, kv = k.shape[0], k.shape[2]
    # The g query heads of a group become more rows of one product: keys are never repeated.
    rows = q.permute(1, 2, 0, 3).reshape(b * kv, (n // kv) * s, d)
    keys = k.permute(1, 2, 3, 0).reshape(b * kv, d, t)
    values = v.permute(1, 2, 0, 3).reshape(b * kv, t, d)
    scores, scale = (rows @ keys).view(b, n, s, t), how.scale_of(q)
    if how.softcap > 0:
        scores, scale = (scores * (scale / how.softcap)).tanh() * how.softcap, 1.0
    probs = ops.scaled_softmax(scores, scale, causal, mask)
    if drop is not None:
        probs = drop(probs)
    out = probs.view(b * kv, (n // kv) * s, t) @ values
    return out.view(b, n, s, d).permute(2, 0, 1, 3)


def sdpa_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    drop: Drop | None = None,
    how: Scores = PLAIN,
) -> Tensor:
    """Attend through torch's fused attention; shapes as in `softmax_core`, which serves what it does not know: dropout
    that no layout changes, and scores that are capped."""
    if drop is not None or how.softcap > 0:
        return softmax_core(q, k, v, mask, causal, drop, how)
    s, t, n = q.shape[0], k.shape[0], q.shape[2]
    # `is_causal` aligns to the top left corner, and excludes a mask: it serves the plain case alone.
    plain = causal and mask is None and s == t
    seen = None if mask is None else ~mask
    if causal and not plain and s > 1:
        before = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
        seen = before if seen is None else seen & before
    out = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        k.permute(1, 2, 0, 3),
        v.permute(1, 2, 0, 3),
        attn_mask=seen,
        is_causal=plain,
        scale=how.scale,
        enable_gqa=n != k.shape[2],
    )
    return out.permute(2, 0, 1, 3)


# Blocks pack keys and values for their products first, which so few queries (decoding) do not pay for.
_LEAST_QUERIES = 16


def blocked_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    drop: Drop | None = None,
    how: Scores = PLAIN,
) -> Tensor:
    """Attend in blocks that stay in a CPU's cache, without the [s, t] scores; shapes as in `softmax_core`.

    That one serves decoding, and what blocks do not know: masks, and dropout of probabilities.
    """
    # Whole products of float16 are slow on every CPU; blocks compute in float32.
    decoding = len(q) < _LEAST_QUERIES and q.dtype != torch.float16
    if mask is not None or not causal or drop is not None or decoding:
        return softmax_core(q, k, v, mask, causal, drop, how)
    return ops.attention(q, k, v, None, how.scale, how.softcap)


CORES: dict[str, Core] = {"softmax": softmax_core, "sdpa": sdpa_core, "blocked": blocked_core}


def core_for(attention: str, device: torch.device) -> str:
    """Return the key of `CORES` that `train.attention` means on a device."""
    if attention != "auto":
        return attention
    return {"cpu": "blocked", "cuda": "sdpa"}.get(device.type, "softmax")


class HeadAttention(nn.Module):
    """Attention of this rank's heads, with the core that the situation asks for.

    Args:
        n_heads: of the whole model.
        placement: where tokens and heads lie.
        site: global name of the layer, for dropout of probabilities.
        core: key of `CORES`.
        dropout: of probabilities.
        scores: what is done to scores, and how far they reach.
    """

    def __init__(
        self, n_heads: int, placement: Placement, site: str, *, core: str, dropout: float, scores: Scores
    ) -> None:
        super().__init__()
        self.placement, self.core, self.scores = placement, CORES[core], scores
        self.first_head = placement.tp.rank * (n_heads // placement.tp.size)
        self.dropout = Dropout(f"{site}.probabilities", dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Attend; it can be computed again in backward.

        Args:
            q: [s, b, n, d].
            k, v: [t, b, k, d]; of the same tokens as q, where there is a cache.
            info: positions and documents.
            cache: what came before, to read and extend.

        Returns: [s, b, n·d].
        """
        if cache is not None:
            if len(q) == 1 and info.positions is not None and self.core is blocked_core:
                how, places = self.scores, info.positions.squeeze(1)
                both = cache.keys, cache.values
                return ops.cached_attention(q, k, v, *both, places, how.window, how.scale, how.softcap).flatten(2)
            k, v = cache.extend(k, v, info)
        attend = partial(self._attend, info=info)
        return self.placement.activations.part("core_attn", attend, q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo) -> Tensor:
        return self._heads(q, k, v, info).flatten(2)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo) -> Tensor:
        how, documents = self.scores, info.documents
        if self.placement.cp.size > 1:
            attend = ALGORITHMS[self.placement.cp_algorithm]
            return attend(q, k, v, self.placement.cp, documents, self.core, how)
        s, t = q.shape[0], k.shape[0]
        window = how.window if how.window is not None and how.window < t else None
        drops = self.training and self.dropout.p > 0.0
        places = torch.arange(t, device=q.device)
        if info.n_cached is not None and info.positions is not None:
            own = info.positions.unsqueeze(-1)
            hidden = places > own
            if window is not None:
                hidden |= places <= own - window
            return self.core(q, k, v, hidden.unsqueeze(1), False, None, how)
        blocked = self.core is blocked_core and not drops and (s == t or s >= _LEAST_QUERIES)
        if blocked and (documents is not None or window is not None):
            one = torch.zeros(1, t, dtype=torch.int64, device=q.device)
            first = ops.first_keys(one if documents is None else documents, window)[:, t - s :]
            return ops.attention(q, k, v, first, how.scale, how.softcap)
        mask = unseen(places[t - s :], places, documents, documents, window)
        if drops:
            return softmax_core(q, k, v, mask, True, lambda probs: self._drop(probs, info), how)
        return self.core(q, k, v, mask, True, None, how)

    def _drop(self, probs: Tensor, info: SequenceInfo) -> Tensor:
        _, n, s, t = probs.shape
        device = probs.device
        head = torch.arange(self.first_head, self.first_head + n, device=device).view(n, 1, 1)
        query = torch.arange(s, device=device).view(s, 1)
        return self.dropout(probs, info, (head * s + query) * t + torch.arange(t, device=device), 0)


class Attention(nn.Module):
    """Project to queries, keys and values; rotate; attend; project back.

    Args:
        model: resolved shape.
        placement: where the parameters lie.
        site: global name of this layer, for dropout.
        core: key of `CORES`.
        out_std: standard deviation of the output projection's initial weight.
        window: how many tokens a token sees, itself included; None for all before it.
    """

    def __init__(
        self,
        model: ModelConfig,
        placement: Placement,
        site: str,
        *,
        core: str,
        out_std: float,
        window: int | None = None,
    ) -> None:
        super().__init__()
        assert model.head_dim is not None and model.n_kv_heads is not None
        tp = placement.tp.size
        self.n_heads, self.n_kv_heads, self.head_dim = model.n_heads // tp, model.n_kv_heads // tp, model.head_dim
        scalar = model.query_pre_attn_scalar
        scores = Scores(None if scalar is None else 1.0 / math.sqrt(scalar), model.attn_softcap or 0.0, window)
        self.heads = HeadAttention(model.n_heads, placement, site, core=core, dropout=model.dropout, scores=scores)
        d, group = model.head_dim, model.n_heads // model.n_kv_heads
        self.qkv = ColumnParallelLinear(
            model.hidden,
            (model.n_heads + 2 * model.n_kv_heads) * d,
            placement,
            std=model.init_std,
            matrices=Matrices((group * d, d, d), groups=model.n_kv_heads),
            bias=model.bias or model.qkv_bias,
        )
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if model.qk_norm_across_heads:
            self.q_norm, self.k_norm = (HeadsRMSNorm(n, d, model, placement) for n in (model.n_heads, model.n_kv_heads))
        elif model.qk_norm:
            # Each rank normalises its own heads, so these gradients are partial, sequence parallelism or not.
            self.q_norm, self.k_norm = (rms_norm(model, placement, ("tp",), d) for _ in range(2))
        self.proj = RowParallelLinear(
            model.n_heads * model.head_dim, model.hidden, placement, std=out_std, bias=model.bias
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        info: SequenceInfo,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map x [s/tp or s, b, h] to the same shape.

        Args:
            x: activations.
            rotary: cos and sin tables, [max_seq_length, d/2], or None without rotary positions.
            info: positions and samples.
            cache: past keys and values, to read and extend; None in training.
        """
        q, k, v = self._split(self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:  # groups stand in for samples: so q is read where it lies in qkv
            positions = None if info.positions is None else info.positions.repeat_interleave(self.n_kv_heads, 0)
            q, k = ops.rope(q.flatten(1, 2), k.flatten(1, 2), *rotary, offset=info.offset, positions=positions)
        s, b, _, d = v.shape
        return self.proj(self.heads(q.reshape(s, b, -1, d), k.reshape(v.shape), v, info, cache))

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take [s, b, k·(g+2)·d] apart into q [s, b, k, g, d], k [s, b, k, 1, d] and v [s, b, k, d]."""
        s, b, _ = qkv.shape
        group = self.n_heads // self.n_kv_heads
        grouped = qkv.view(s, b, self.n_kv_heads, group + 2, self.head_dim)
        # By one `split`, whose backward writes the gradient in one pass; v apart, for it alone would keep all of qkv.
        q, k, v = grouped.split((group, 1, 1), dim=-2)
        return q, k, v.squeeze(-2).contiguous()
