"""The router of a mixture of experts: which experts a token uses, with what weight, and how their load is kept even.

Legend: `s` tokens of this rank, `S` of the sequence, `b` micro-batch, `h` hidden, `E` experts, `k` experts of a token.

Worked example, E = 4, k = 2, softmax scores of one token .4 .3 .2 .1: it uses experts 0 and 1 with weights .4 and .3,
or .57 and .43 where the weights are made to add up to 1. With biases 0 0 .2 0, which only choose, it uses experts 0 and
2, with weights .4 and .2.

Two groups of experts, (0 1) and (2 3), of which one may be chosen (`router_group_topk`): a group's score is the sum of
its best k / group_topk scores, .7 and .3, so the experts come from the first.

Balance, two ways. *Auxiliary loss*: E / (k S²) · Σᵢ Cᵢ Pᵢ, with Cᵢ the tokens that use expert i and Pᵢ the sum of its
scores: 1 when even, and its gradient, through P, lowers the scores of busy experts. `seq_aux_loss` takes it over each
sequence: C is summed over the ranks that share the sequence (cp, and tp under sequence parallelism), P need not be,
because the loss is linear in it. So no layout changes it. `aux_loss` takes it over a micro-batch: its layout matters
through the micro-batch's composition alone. Either counts in the mean loss as the tokens of its sequences do. *Bias*:
after each step, the bias of experts with more than the mean load falls by a fixed rate, that of the others rises.

Sources: Shazeer et al. 2017, arXiv:1701.06538; Lepikhin et al. 2020, arXiv:2006.16668 (GShard); Fedus et al. 2021,
arXiv:2101.03961 (Switch), section 2.2; Zoph et al. 2022, arXiv:2202.08906 (z-loss); DeepSeek-V3, arXiv:2412.19437,
section 2.1.2 (sigmoid, groups, bias).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.dist.layout import Init
from megascratch.nn.context import natural_order, token_index
from megascratch.nn.placement import Placement
from megascratch.nn.sequence import SequenceInfo

NONE = -1  # in place of an expert: this choice of the token was dropped


@dataclass(frozen=True)
class Routing:
    """Where this rank's tokens go.

    Attributes:
        experts: [s, b, k] int64; `NONE` where the expert was full.
        weights: of their results, [s, b, k] in `acc_dtype`.
    """

    experts: Tensor
    weights: Tensor


class _WithLoss(torch.autograd.Function):
    """Hand x on; backward differentiates a loss besides, so that it need not travel to the last stage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, seed: float | Tensor) -> Tensor:
        ctx.seed = seed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.as_tensor(ctx.seed, dtype=grad.dtype, device=grad.device), None


class Router(nn.Module):
    """Score experts by one product, choose the best k, and note how even the load is.

    Args:
        model: resolved shape, with experts.
        placement: where the parameters and tokens lie.
        site: global name of this layer, under which `SequenceInfo.notes` finds its statistics.
    """

    def __init__(self, model: ModelConfig, placement: Placement, site: str) -> None:
        super().__init__()
        assert model.moe is not None
        self.moe, self.placement, self.site = model.moe, placement, site
        n = model.moe.num_experts
        # Each rank routes its own tokens, so the gradient is partial where tokens are divided.
        self.weight = placement.parameter(n, model.hidden, grad_axes=placement.token_axes, init=Init(model.init_std))
        self.bias: nn.Parameter | None = None
        if model.moe.router_enable_expert_bias:
            # Steps of 0.001 would be lost in 16 bits.
            wide = ops.acc_dtype(self.weight)
            self.bias = placement.parameter(n, decay=False, dtype=wide)
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor, info: SequenceInfo) -> Routing:
        """Route tokens x [s, b, h]."""
        dtype = ops.acc_dtype(x)
        logits = F.linear(x.to(dtype), self.weight.to(dtype))
        if self.moe.router_score_function == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)
        experts = self._choose(scores.detach())
        weights = scores.gather(-1, experts)
        if self.moe.router_norm_topk:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.moe.router_topk_scaling_factor
        load = torch.zeros_like(scores).scatter_(-1, experts, 1.0)
        aux, z = self._losses(logits, probs, load.sum(0), info)
        if torch.is_grad_enabled() and info.loss_tokens is not None:
            weights = _WithLoss.apply(weights, aux + z, info.loss_seed)
        n_chosen = experts.numel()
        if self.training and self.moe.expert_capacity_factor is not None:
            experts = self._within_capacity(experts, self.moe.expert_capacity_factor)
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum()
        rest = torch.stack([aux, z, entropy, (experts == NONE).sum().to(dtype), load.new_tensor(n_chosen)])
        info.notes[self.site] = torch.cat([load.sum((0, 1)), rest]).detach()
        return Routing(experts, weights)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the best k experts by biased scores, [s, b, k], from scores [s, b, E]."""
        moe = self.moe
        if self.bias is not None:
            scores = torch.add(scores, self.bias)
        if moe.router_num_groups is not None and moe.router_group_topk is not None:
            grouped = scores.unflatten(-1, (moe.router_num_groups, -1))
            of_group = grouped.topk(moe.router_topk // moe.router_group_topk, dim=-1).values.sum(-1)
            best = of_group.topk(moe.router_group_topk, dim=-1).indices
            allowed = torch.zeros_like(of_group, dtype=torch.bool).scatter_(-1, best, True)
            scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores.topk(moe.router_topk, dim=-1).indices

    def _losses(self, logits: Tensor, probs: Tensor, load: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the auxiliary loss and of the z-loss, times the loss tokens of each sequence.

        Args:
            logits, probs: [s, b, E].
            load: tokens of each sequence on this rank that use each expert, [b, E].
            info: gives the loss tokens; without them there is no loss.
        """
        moe, at = self.moe, self.placement
        length = info.length * at.cp.size
        z = logits.new_zeros(())
        if info.loss_tokens is None:
            return z, z
        tokens = info.loss_tokens.to(logits)
        if moe.z_loss_coeff > 0:
            z = (logits.logsumexp(-1).square() * tokens).sum() * (moe.z_loss_coeff / length)
        if moe.router_load_balancing_type == "none":
            return logits.new_zeros(()), z
        share = comm.sum_over(load, at.cp)
        share = comm.sum_over(share, at.tp) if at.sequence_parallel else share
        product = share, probs.sum(0)
        if moe.router_load_balancing_type == "aux_loss":
            tokens, length = tokens.sum(), length * load.shape[0]
            product = product[0].sum(0), product[1].sum(0)
        scale = moe.aux_loss_coeff * moe.num_experts / (moe.router_topk * length**2)
        return ((product[0] * product[1]).sum(-1) * tokens).sum() * scale, z

    def _within_capacity(self, experts: Tensor, factor: float) -> Tensor:
        """Replace choices by `NONE` that come, in the order of the sequence, when their expert is full.

        An expert takes ⌈factor · k S / E⌉ tokens of a sequence, wherever its tokens lie: the ranks that share it show
        each other their choices.
        """
        at = self.placement
        whole = comm.all_gather(experts, at.tp) if at.sequence_parallel else experts
        own = token_index(len(whole) * at.cp.size, at.cp, experts.device)
        if at.cp.size > 1:
            whole = comm.all_gather(whole, at.cp)[natural_order(len(own) * at.cp.size, at.cp, experts.device)]
        length, b, k = whole.shape
        capacity = math.ceil(factor * k * length / self.moe.num_experts)
        # One number an expert of a sequence; a stable sort puts its tokens in a row, in their order.
        key = (whole + self.moe.num_experts * torch.arange(b, device=whole.device).view(b, 1)).flatten()
        order = key.argsort(stable=True)
        start = torch.searchsorted(key[order], key[order])
        place = torch.empty_like(key)
        place[order] = torch.arange(len(key), device=key.device) - start
        kept = whole.masked_fill(place.view_as(whole) >= capacity, NONE)[own]
        return kept.chunk(at.tp.size)[at.tp.rank] if at.sequence_parallel else kept

    @torch.no_grad()
    def move_bias(self, load: Tensor) -> None:
        """Raise the bias of experts with less than the mean load, [E] of a global batch; lower that of the others."""
        if self.bias is not None:
            self.bias.add_(self.moe.router_bias_update_rate * (load.mean() - load).sign())


@dataclass(frozen=True)
class RouterReport:
    """How even one layer's load was over a global batch.

    Attributes:
        load: choices that fell on each expert, [E] float64.
        metrics: by name; aux_loss and z_loss are means over the loss tokens, as they count in the loss.
    """

    load: Tensor
    metrics: dict[str, float]
    n_scalars: ClassVar[int] = 5  # behind the load in a note

    @classmethod
    def of(cls, note: Tensor, topk: int, loss_tokens: float) -> "RouterReport":
        """Read the sum of a layer's notes, [E + n_scalars], over a global batch with so many loss tokens."""
        load, (aux, z, entropy, dropped, chosen) = note[: -cls.n_scalars], note[-cls.n_scalars :].tolist()
        mean = load.mean().item()
        metrics = {
            "aux_loss": aux / loss_tokens,
            "z_loss": z / loss_tokens,
            "entropy": entropy * topk / chosen,
            "dropped": dropped / chosen,
            "load_min": load.min().item() / mean,
            "max_violation": load.max().item() / mean - 1.0,
        }
        return cls(load, metrics)
