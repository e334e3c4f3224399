"""Experts: many small feed-forward layers, of which each rank of ep holds some, and the way of tokens to them and back.

Legend: `t` tokens of this rank, `k` choices of a token, `n` rows that this rank's experts work on, `E` experts, `e` of
this rank, `h` hidden, `f` feed-forward size of an expert, divided over tp.

By hand, 3 tokens a b c with 2 choices each of 4 experts, on ep = 2, where rank 0 has experts 0 1 and rank 1 has 2 3:

    choices                a: 0 2    b: 2 3    c: 0 1
    sorted by expert       a c | c | a b | b                    experts 0 | 1 | 2 | 3
    sent                   a c c to rank 0, a b b to rank 1     and the other rank's tokens come here
    sorted again           all rows of expert 0, all of expert 1: one grouped product
    back, unsorted         two rows a token, added with their weights

Sorting is stable and sums run over the choices of a token in order: the result does not depend on who came first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.dist.layout import Init, Matrices, Split
from megascratch.dist.mesh import Axis
from megascratch.nn.nf4 import Weight, values_of
from megascratch.nn.placement import Placement
from megascratch.nn.weight_gradients import WeightGradients, main_grad, weight_gradient


@torch.no_grad()
def grouped_product(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """Multiply each expert's rows by its own matrix: [n, i], [e, i, o], rows an expert → [n, o]."""
    if _has_grouped_kernel(x):
        return F.grouped_mm(x, weight, offs=_ends(sizes, x))
    out = x.new_empty(len(x), weight.shape[2])
    for rows, result, matrix in zip(x.split(list(sizes)), out.split(list(sizes)), weight):
        ops.matmul_into(result, rows, matrix, add=False)
    return out


@torch.no_grad()
def grouped_gradient(x: Tensor, grad: Tensor, sizes: Sequence[int], total: Tensor | None = None) -> Tensor | None:
    """Multiply each expert's rows with each other: [n, i], [n, o] → [e, o, i], or None if that was added to `total`."""
    if _has_grouped_kernel(x):
        out = F.grouped_mm(grad.t(), x, offs=_ends(sizes, x))
        if total is None:
            return out
        total += out
        return None
    out = x.new_empty(len(sizes), grad.shape[1], x.shape[1]) if total is None else total
    for rows, grads, result in zip(x.split(list(sizes)), grad.split(list(sizes)), out):
        ops.matmul_into(result, grads.t(), rows, add=total is not None)  # zeros where an expert has no rows
    return out if total is None else None


def _has_grouped_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


def _ends(sizes: Sequence[int], x: Tensor) -> Tensor:
    return torch.tensor(sizes, device=x.device).cumsum(0).to(torch.int32)


class _GroupedLinear(torch.autograd.Function):
    """Rows times their expert's weight, transposed; the weight's gradient can be put off, as in `nn.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, sizes: Sequence[int], later: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.sizes, ctx.later = weight, sizes, later  # the weight itself: see `nn.linear`
        return grouped_product(x, _matrices(values_of(weight)).transpose(1, 2), sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x,), weight, sizes = ctx.saved_tensors, ctx.weight, ctx.sizes
        grad = grad.contiguous()
        grad_x = grouped_product(grad, _matrices(values_of(weight)), sizes) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(weight, partial(_grad_weight, x, grad, weight, sizes), ctx.later)
        return grad_x, grad_weight, None, None


def grouped_linear(x: Tensor, weight: Weight, sizes: Sequence[int], later: WeightGradients | None) -> Tensor:
    """Multiply each expert's rows [n, i] by its weight, transposed: [e, o, i] or [e, 2, o/2, i] → [n, o].

    Args:
        sizes: rows of each expert.
        later: takes the weight's gradient while it collects.
    """
    return _GroupedLinear.apply(x, weight, sizes, later)


def _grad_weight(x: Tensor, grad: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Return the weight's gradient, or None where it was added to its main gradient."""
    total = main_grad(weight)
    out = grouped_gradient(x, grad, sizes, None if total is None else _matrices(total))
    return None if out is None else out.view_as(weight)


def _matrices(weight: Tensor) -> Tensor:
    """View [e, f, h] or [e, 2, f, h] as [e, rows, h]."""
    return weight.flatten(1, -2)


class _Take(torch.autograd.Function):
    """Rows of tokens by choices, [t, h] → [n, h]; the gradient of a token is the sum over its choices, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k, ctx.tokens = k, len(x)
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _unsorted(grad, order, ctx.tokens * ctx.k).unflatten(0, (ctx.tokens, ctx.k)).sum(1), None, None


class _Unsort(torch.autograd.Function):
    """Rows back in the order of choices, [n, h] → [length, h]; zeros where a choice has no row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(order)
        return _unsorted(x, order, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def _unsorted(x: Tensor, order: Tensor, length: int) -> Tensor:
    return x.new_zeros(length, x.shape[1]).index_copy_(0, order, x)


@dataclass(frozen=True)
class Dispatch:
    """Where rows go.

    Attributes:
        order: choices sorted by expert, without those that were dropped, [Σ send] int64.
        send, receive: rows to and from each rank of ep.
        arrival: received rows sorted by expert, [n] int64.
        sizes: rows of each expert of this rank.
    """

    order: Tensor
    send: list[int]
    receive: list[int]
    arrival: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, experts: Tensor, n_experts: int, ep: Axis) -> "Dispatch":
        """Plan the way of choices [t·k] of experts 0 ≤ e < n_experts; those below 0 were dropped."""
        own = n_experts // ep.size
        if experts.is_meta:  # shapes alone: as if the load were even
            n, device = experts.numel(), experts.device
            index = torch.empty(n, dtype=torch.int64, device=device)
            sizes = [n // own + (i < n % own) for i in range(own)]
            even = [n // ep.size + (i < n % ep.size) for i in range(ep.size)]
            return cls(index, even, even, index, sizes)
        counts = torch.bincount(experts + 1, minlength=n_experts + 1)
        dropped, counts = counts[:1], counts[1:]
        everyones = comm.all_gather(torch.cat((dropped, counts)).unsqueeze(0), ep).cpu()  # the one wait for the device
        n_dropped, everyones = int(everyones[ep.rank, 0]), everyones[:, 1:].view(ep.size, ep.size, own)
        order = experts.argsort(stable=True)[n_dropped:]
        arriving = everyones[:, ep.rank]  # [ep, e]
        of_expert = torch.arange(own).repeat(ep.size).repeat_interleave(arriving.flatten())
        arrival = of_expert.argsort(stable=True).to(experts.device)
        send, receive = everyones[ep.rank].sum(1).tolist(), arriving.sum(1).tolist()
        return cls(order, send, receive, arrival, arriving.sum(0).tolist())


class Experts(nn.Module):
    """The experts of this rank, and the exchange with the others of ep.

    Args:
        model: resolved shape, with experts.
        placement: where the parameters lie: experts over ep, features over tp.
        activation: of gate and up side by side, or of up alone.
        gated: which of the two.
        out_std: standard deviation of the initial output weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        placement: Placement,
        activation: Callable[[Tensor], Tensor],
        gated: bool,
        *,
        out_std: float,
    ) -> None:
        super().__init__()
        assert model.moe is not None
        n, h, f = model.moe.num_experts, model.hidden, model.moe.ffn_hidden
        self.placement, self.activation, self.n_experts = placement, activation, n
        self.adapters = nn.ModuleDict()  # `nn.adapters`, by the name of the weight
        self.up: Weight = placement.parameter(
            n,
            *((2, f, h) if gated else (f, h)),
            splits=(Split(0, "ep"), Split(2 if gated else 1, "tp")),
            init=Init(model.init_std),
            matrices=Matrices((f,)),
        )
        self.down: Weight = placement.parameter(
            n, h, f, splits=(Split(0, "ep"), Split(2, "tp")), init=Init(out_std), matrices=Matrices((h,))
        )

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Add up what its experts make of each token; over tp the result is still to be summed.

        Args:
            x: [t, h], the same on every rank of tp, as all arguments.
            experts: [t, k] int64, below 0 for none.
            weights: [t, k].

        Returns: [t, h].
        """
        at, (t, k) = self.placement, experts.shape
        way = Dispatch.of(experts.flatten(), self.n_experts, at.ep)
        rows = comm.all_to_all_rows(_Take.apply(x, way.order, k), way.send, way.receive, at.ep)
        rows = _Take.apply(rows, way.arrival, 1)
        features = self._product("up", rows, way.sizes)
        active = at.activations.part("mlp_act", self.activation, features)
        rows = self._product("down", active, way.sizes)
        rows = _Unsort.apply(rows, way.arrival, len(rows))
        rows = comm.all_to_all_rows(rows, way.receive, way.send, at.ep)
        chosen = _Unsort.apply(rows, way.order, t * k).view(t, k, -1)
        return (chosen * weights.to(x.dtype).unsqueeze(-1)).sum(1)

    def _product(self, name: str, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Multiply by one of the weights, and add what its adapter says."""
        y = grouped_linear(rows, getattr(self, name), sizes, self.placement.weight_gradients)
        if name in self.adapters and self.adapters[name].active:
            y = y + self.adapters[name](rows, sizes)
        return y
