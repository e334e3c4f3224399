"""Mixture of experts: a feed-forward layer of which each token uses a part.

Legend: `s` sequence, `b` micro-batch, `h` hidden, `k` experts a token uses.

    x [s/tp, b, h] ─ router ─ choices and weights [s/tp, b, k] ─ all_gather over tp ─┐
      └───────────── all_gather over tp ── [s, b, h] ── experts, f/tp, e of ep ──────┴─ reduce_scatter ─ [s/tp, b, h]
      └── shared experts: a feed-forward layer for every token ─────────────────────────────────────── + ┘

Without sequence parallelism `copy` and `all_reduce` stand for the collectives over tp, as in `nn.linear`.
"""

import torch
from torch import Tensor, nn

from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.dist.layout import Init
from megascratch.nn.experts import Experts
from megascratch.nn.mlp import GATED, PLAIN, GatedMLP, PlainMLP
from megascratch.nn.placement import Placement
from megascratch.nn.router import Router
from megascratch.nn.sequence import SequenceInfo


class MoE(nn.Module):
    """Route each token to a few experts, and add the shared ones.

    Args:
        model: resolved shape, with experts.
        placement: where parameters and tokens lie.
        site: global name of this layer.
        out_std: standard deviation of initial weights onto the residual stream.
    """

    def __init__(self, model: ModelConfig, placement: Placement, site: str, *, out_std: float) -> None:
        super().__init__()
        assert model.moe is not None
        self.placement = placement
        gated = model.activation in GATED
        self.router = Router(model, placement, site)
        self.experts = Experts(model, placement, {**GATED, **PLAIN}[model.activation], gated=gated, out_std=out_std)
        self.shared: nn.Module | None = None
        self.shared_gate: nn.Parameter | None = None
        if (f := model.moe.shared_expert_ffn_hidden) is not None:
            shape = model.model_copy(update={"ffn_hidden": f})
            self.shared = (GatedMLP if gated else PlainMLP)(shape, placement, out_std=out_std)
        if model.moe.shared_expert_gate:
            axes = placement.token_axes
            self.shared_gate = placement.parameter(1, model.hidden, grad_axes=axes, init=Init(model.init_std))

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        """Map x [s/tp or s, b, h] to the same shape."""
        at, routing = self.placement, self.router(x, info)
        enter, leave = (comm.all_gather, comm.reduce_scatter) if at.sequence_parallel else (comm.copy, comm.all_reduce)
        whole, weights = enter(x, at.tp), enter(routing.weights, at.tp)
        experts = comm.all_gather(routing.experts, at.tp) if at.sequence_parallel else routing.experts
        y = self.experts(whole.flatten(0, 1), experts.flatten(0, 1), weights.flatten(0, 1))
        y = leave(y.view_as(whole), at.tp)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * torch.nn.functional.linear(x, self.shared_gate).sigmoid()
        return y + shared
