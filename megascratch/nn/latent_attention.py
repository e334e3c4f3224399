"""Multi-head latent attention: keys and values are made from one short latent vector a token, and only it is cached.

Legend: `s` sequence (queries), `t` keys, `b` micro-batch, `h` hidden, `n` heads, `c` latent size, `d` head dimension of
the part without positions, `r` of the part with rotary positions, `v` of values.

    x ─ q_down ─ norm ─ q_up ─────────── [d | r] a head ─ rotate r ─────────── q [s, b, n, d + r]
    x ─ kv_down ─┬─ latent [c] ─ norm ─ kv_up ─ [d | v] a head ─┬──────────── k [t, b, n, d + r], v [t, b, n, v]
                 └─ [r], one for all heads ─ rotate ────────────┘

By hand, DeepSeek-V3: 128 heads of 128 + 64 and values of 128 would cache 128 · 320 = 40,960 numbers a token and layer;
latent and rotary part are 512 + 64 = 576.

The ups are divided over tp by heads, and gather the short vectors under sequence parallelism, not x. The downs lie
whole on every rank, each of which has its own tokens. Values are padded with zeros to d + r for the attention cores,
which know one head dimension.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; -V3, arXiv:2412.19437, section 2.1.1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.nn.attention import HeadAttention, LayerCache
from megascratch.nn.context import Scores
from megascratch.nn.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megascratch.nn.norm import RMSNorm, rms_norm
from megascratch.nn.placement import Placement
from megascratch.nn.sequence import SequenceInfo


class LatentAttention(nn.Module):
    """Attention whose keys, values and queries go through latent vectors.

    Args:
        model: resolved shape, with `mla`.
        placement: where the parameters lie.
        site: global name of this layer, for dropout.
        core: key of `nn.attention.CORES`.
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
        mla, std, h, n = model.mla, model.init_std, model.hidden, model.n_heads
        assert mla is not None
        self.placement, self.mla = placement, mla
        self.n_heads = n // placement.tp.size
        width = mla.qk_head_dim + mla.qk_pos_emb_head_dim
        scores = Scores(softcap=model.attn_softcap or 0.0, window=window)
        self.heads = HeadAttention(n, placement, site, core=core, dropout=model.dropout, scores=scores)
        self.q_down: ReplicatedLinear | None = None
        self.q_norm: RMSNorm | None = None
        if mla.q_lora_rank is not None:
            self.q_down = ReplicatedLinear(h, mla.q_lora_rank, placement, std=std)
            self.q_norm = rms_norm(model, placement, placement.token_axes, mla.q_lora_rank)
        self.q_up = ColumnParallelLinear(mla.q_lora_rank or h, n * width, placement, std=std)
        self.kv_down = ReplicatedLinear(h, mla.kv_lora_rank + mla.qk_pos_emb_head_dim, placement, std=std)
        self.kv_norm = rms_norm(model, placement, placement.token_axes, mla.kv_lora_rank)
        self.kv_up = ColumnParallelLinear(mla.kv_lora_rank, n * (mla.qk_head_dim + mla.v_head_dim), placement, std=std)
        self.proj = RowParallelLinear(n * mla.v_head_dim, h, placement, std=out_std)
        # The core divides by √(d + r). YaRN's temperature is on the whole score here, not on the rotary tables.
        scaling, self.temperature = model.rope_scaling, 1.0
        if scaling is not None and scaling.type == "yarn":
            self.temperature = (0.1 * math.log(scaling.factor) + 1.0) ** 2

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        info: SequenceInfo,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map x [s/tp or s, b, h] to the same shape; arguments as in `Attention.forward`.

        The cache holds latent vectors [t_max, b, 1, c] as keys, and the rotated part [t_max, b, 1, r] as values.
        """
        assert rotary is not None
        mla, at = self.mla, self.placement
        latent_q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q_up(latent_q).unflatten(-1, (self.n_heads, -1))
        q, q_rotary = q.split([mla.qk_head_dim, mla.qk_pos_emb_head_dim], dim=-1)
        latent, k_rotary = self.kv_down(x).split([mla.kv_lora_rank, mla.qk_pos_emb_head_dim], dim=-1)
        latent = self.kv_norm(latent)
        enter = comm.all_gather if at.sequence_parallel else comm.copy
        k_rotary = enter(k_rotary.contiguous(), at.tp).unsqueeze(2)  # every rank's heads use it whole
        q_rotary, k_rotary = ops.rope(
            q_rotary.contiguous(), k_rotary, *rotary, offset=info.offset, positions=info.positions
        )
        if cache is not None:
            whole, k_rotary = cache.extend(latent.unsqueeze(2), k_rotary, info)
            latent = whole.squeeze(2)
        q = torch.cat((q, q_rotary), dim=-1) * self.temperature
        k, v = at.activations.part("mla_up_proj", self._expand, latent, k_rotary)
        heads = self.heads(q, k, v, info).unflatten(-1, (self.n_heads, -1))[..., : mla.v_head_dim]
        return self.proj(heads.flatten(2))

    def _expand(self, latent: Tensor, k_rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Make k and v [t, b, n, d + r], v padded, from the latent [t/tp or t, b, c] and k_rotary [t, b, 1, r]."""
        mla = self.mla
        up = self.kv_up(latent).unflatten(-1, (self.n_heads, -1))
        k, v = up.split([mla.qk_head_dim, mla.v_head_dim], dim=-1)
        k = torch.cat((k, k_rotary.expand(-1, -1, self.n_heads, -1)), dim=-1)
        return k, F.pad(v, (0, k.shape[-1] - mla.v_head_dim))
