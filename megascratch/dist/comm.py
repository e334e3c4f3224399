"""Collectives along one mesh axis, as autograd functions in conjugate pairs, and the plain ones that carry no gradient.

The gradient of a linear map A is its adjoint Aᵀ, and the adjoint of one collective is another:

    forward          backward         who uses it
    copy             all_reduce       enter a tensor-parallel region without sequence parallelism
    all_reduce       copy             leave it
    all_gather       reduce_scatter   enter a tensor-parallel region under sequence parallelism
    reduce_scatter   all_gather       leave it
    scatter          gather           take one's part of a tensor that every rank holds
    all_to_all_rows  all_to_all_rows  send rows to the ranks that work on them, and back
    gather           scatter          put the parts together for ranks that then all compute the same
    all_to_all       all_to_all       swap which dimension is divided

`all_gather` and `gather` move the same bytes and differ in what follows: after `all_gather` each rank uses the whole
for its own purpose, so gradients differ and are summed; after `gather` every rank computes the same, so the gradient is
the same everywhere and each takes its part.

On an axis of size 1 every function returns its input. On the meta device, where tensors are shapes alone, nothing is
sent: a layer's memory can be counted for any layout by one process. No function changes its input. Shapes: `dim` is
divided by, or multiplied with, the size of the axis; all other dimensions stay.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megascratch.dist.mesh import Axis
from megascratch.errors import Problem

# torch 2.13 gave these two new names and warns at the old ones.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> Any: ...


@dataclass
class _Compared:
    """A transfer in debug mode: what its ranks are about to do is compared before it is waited for."""

    work: Work
    compare: Callable[[], None]

    def wait(self) -> None:
        self.compare()
        self.work.wait()


def _together(operation: str, axis: Axis, x: Tensor | None = None) -> AbstractContextManager[None]:
    """Begin a collective that this rank waits for; in debug mode, once all ranks are seen to begin the same.

    Args:
        operation: its name.
        axis: over which it goes.
        x: what it takes, where that has one shape on all ranks.
    """
    if axis.roll_call is not None:
        axis.roll_call.meet(axis, operation, x)
    return axis.waiting(operation)


def _started(operation: str, axis: Axis, x: Tensor, start: Callable[[], Work]) -> Work:
    """Start a collective that is waited for later."""
    if axis.roll_call is None:
        return start()
    compare = axis.roll_call.announce(axis, operation, x)
    return _Compared(start(), compare)


def _reduced(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if not x.is_meta:
        with _together("all_reduce", axis, x):
            dist.all_reduce(out, op=op, group=axis.group)
    return out


def _gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((axis.size, *x.shape))
    if not x.is_meta:
        with _together("all_gather", axis, x):
            _ALL_GATHER(out.view(-1), x.view(-1), group=axis.group)
    if dim == 0:  # [n, s, ...] is already the concatenation
        return out.view(axis.size * x.shape[0], *x.shape[1:])
    return torch.cat(out.unbind(0), dim=dim)


def _reduce_scattered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    assert x.shape[dim] % axis.size == 0, f"dim {dim} of {tuple(x.shape)} does not divide by {axis.name} {axis.size}"
    parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(axis.size, dim=dim), dim=0)
    shape = list(x.shape)
    shape[dim] //= axis.size
    out = x.new_empty(shape)
    if not x.is_meta:
        with _together("reduce_scatter", axis, x):
            _REDUCE_SCATTER(out.view(-1), parts.view(-1), group=axis.group)
    return out


def _part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    assert x.shape[dim] % axis.size == 0, f"dim {dim} of {tuple(x.shape)} does not divide by {axis.name} {axis.size}"
    return x.chunk(axis.size, dim=dim)[axis.rank].contiguous()


def _swapped(x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
    parts = torch.stack(x.chunk(axis.size, dim=split_dim))
    out = torch.empty_like(parts)
    if not x.is_meta:
        with _together("all_to_all", axis, x):
            dist.all_to_all_single(out.view(-1), parts.view(-1), group=axis.group)
    return torch.cat(out.unbind(0), dim=join_dim)


def _rows_swapped(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    if not x.is_meta:
        with _together("all_to_all_rows", axis):
            dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=axis.group)
    return out


class _Linear(torch.autograd.Function):
    """A linear map with its adjoint as the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint if axis.roll_call is None else axis.roll_call.backward_of_here(adjoint)
        return apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.adjoint(grad), None, None, None


def copy(x: Tensor, axis: Axis) -> Tensor:
    """Hand the same tensor to every rank's own computation. Backward sums the gradients over the axis."""
    if axis.size == 1:
        return x
    return _Linear.apply(x, axis, lambda t: t.view_as(t), lambda g: _reduced(g, axis))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; every rank gets the sum. Backward passes the gradient through."""
    if axis.size == 1:
        return x
    return _Linear.apply(x, axis, lambda t: _reduced(t, axis), lambda g: g)


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate the ranks' parts along `dim`. Backward sums the gradients and leaves each rank its part."""
    if axis.size == 1:
        return x
    return _Linear.apply(x, axis, lambda t: _gathered(t, axis, dim), lambda g: _reduce_scattered(g, axis, dim))


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum over the axis and leave each rank its part along `dim`. Backward concatenates the gradients."""
    if axis.size == 1:
        return x
    return _Linear.apply(x, axis, lambda t: _reduce_scattered(t, axis, dim), lambda g: _gathered(g, axis, dim))


def scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Take this rank's part, along `dim`, of a tensor that is the same everywhere. Backward concatenates."""
    if axis.size == 1:
        return x
    return _Linear.apply(x, axis, lambda t: _part(t, axis, dim), lambda g: _gathered(g, axis, dim))


def gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate parts for ranks that then all compute the same. Backward takes this rank's part of the gradient."""
    if axis.size == 1:
        return x
    return _Linear.apply(x, axis, lambda t: _gathered(t, axis, dim), lambda g: _part(g, axis, dim))


def all_to_all(x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
    """Divide `split_dim` over the axis and put `join_dim` together. Backward does the reverse."""
    if axis.size == 1:
        return x
    return _Linear.apply(
        x, axis, lambda t: _swapped(t, axis, split_dim, join_dim), lambda g: _swapped(g, axis, join_dim, split_dim)
    )


def all_to_all_rows(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Send consecutive rows to every rank, each its own number. Backward sends their gradients home.

    Args:
        x: [Σ send, …], the rows for each rank of the axis in order.
        send, receive: how many rows go to each rank, and come from it.
        axis: to exchange along.

    Returns: [Σ receive, …], the rows from each rank in order.
    """
    if axis.size == 1:
        return x
    return _Linear.apply(
        x, axis, lambda t: _rows_swapped(t, send, receive, axis), lambda g: _rows_swapped(g, receive, send, axis)
    )


# Plain collectives: no gradient.


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """Return the elementwise maximum over the axis, on every rank."""
    return x if axis.size == 1 else _reduced(x.detach(), axis, dist.ReduceOp.MAX)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Return the elementwise sum over the axis, on every rank."""
    return x if axis.size == 1 else _reduced(x.detach(), axis)


def reduce_buffer(buffer: Tensor, axis: Axis) -> None:
    """Sum a gradient buffer over the axis in place: the one collective that writes to its argument, to save a copy."""
    if axis.size > 1:
        with _together("all_reduce", axis, buffer):
            dist.all_reduce(buffer, group=axis.group)


def start_all_reduce(buffer: Tensor, axis: Axis) -> Work | None:
    """Start to sum a buffer over the axis in place; None where there is nothing to wait for."""
    if axis.size == 1:
        return None
    return _started("all_reduce", axis, buffer, lambda: dist.all_reduce(buffer, group=axis.group, async_op=True))


def start_reduce_scatter(buffer: Tensor, part: Tensor, axis: Axis) -> Work | None:
    """Start to sum a flat buffer [n] over the axis, and to fill `part` [n / size] with this rank's part of the sum."""
    if axis.size == 1:
        part.copy_(buffer)
        return None
    return _started(
        "reduce_scatter", axis, buffer, lambda: _REDUCE_SCATTER(part, buffer, group=axis.group, async_op=True)
    )


def start_all_gather(buffer: Tensor, part: Tensor, axis: Axis) -> Work | None:
    """Start to fill a flat buffer [n] with every rank's part [n / size], in rank order."""
    if axis.size == 1:
        buffer.copy_(part)
        return None
    return _started("all_gather", axis, part, lambda: _ALL_GATHER(buffer, part, group=axis.group, async_op=True))


def exchange(parts: Sequence[Tensor], sizes: Sequence[int], axis: Axis) -> list[Tensor]:
    """Send a part to every rank, each of its own length, and return what every rank sent here.

    Args:
        parts: one-dimensional, one a rank of the axis in order, all of one dtype; empty ones are allowed.
        sizes: how many elements each rank sends here.
        axis: to exchange along.
    """
    if axis.size == 1:
        return list(parts)
    out = parts[0].new_empty(sum(sizes))
    sent = torch.cat(list(parts))
    with _together("exchange", axis):
        dist.all_to_all_single(out, sent, list(sizes), [p.numel() for p in parts], group=axis.group)
    return list(out.split(list(sizes)))


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Return the tensor of the rank at coordinate `source`; the others give one of equal shape and dtype."""
    if axis.size == 1:
        return x
    out = x.detach().clone(memory_format=torch.contiguous_format)
    with _together("broadcast", axis, x):
        dist.broadcast(out, src=axis.ranks[source], group=axis.group)
    return out


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        with _together("barrier", axis):
            dist.barrier(group=axis.group)


def gather_bytes(data: bytes, axis: Axis, device: torch.device | None = None) -> list[bytes]:
    """Return every rank's bytes, in the order of the axis, on every rank.

    Args:
        data: any length, also different on each rank.
        axis: to gather along.
        device: where the backend wants its tensors; CPU when left out.
    """
    if axis.size == 1:
        return [data]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    lengths = _gathered(torch.tensor([len(data)], device=device), axis, 0).tolist()
    padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=device)
    padded[: len(data)] = own.to(padded.device)
    rows = _gathered(padded, axis, 0).view(axis.size, -1).cpu()
    return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths)]


def gather_flags(flag: bool, axis: Axis, device: torch.device | None = None) -> list[bool]:
    """Return every rank's flag, in the order of the axis, on every rank."""
    return [data == b"1" for data in gather_bytes(b"1" if flag else b"0", axis, device)]


def gather_problems(problems: Sequence[Problem], axis: Axis, device: torch.device | None = None) -> list[Problem]:
    """Return the problems that any rank has met, on every rank: a rank that fails must not leave others waiting."""
    own = json.dumps([[p.value, p.rule, p.remedy] for p in problems]).encode()
    return [Problem(*problem) for data in gather_bytes(own, axis, device) for problem in json.loads(data)]


def isend(x: Tensor, axis: Axis, peer: int, tag: int) -> Work:
    """Start sending a contiguous tensor to the rank at coordinate `peer`. It must not change before `wait`."""
    return _transferred(dist.isend, x, axis, peer, tag)


def irecv(buffer: Tensor, axis: Axis, peer: int, tag: int) -> Work:
    """Start receiving into a contiguous buffer from the rank at coordinate `peer`; it is filled after `wait`."""
    return _transferred(dist.irecv, buffer, axis, peer, tag)


def _transferred(start: Callable[..., Work | None], x: Tensor, axis: Axis, peer: int, tag: int) -> Work:
    compare = None
    if axis.roll_call is not None:
        compare = axis.roll_call.announce_transfer(axis, peer, start is dist.isend, tag, x)
    work = start(x, axis.ranks[peer], group=axis.group, tag=tag)
    assert work is not None
    return work if compare is None else _Compared(work, compare)


def pass_on(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Start handing a tensor to the next rank of the ring; the function returned waits for the previous rank's."""
    return _exchanged(x, axis, (axis.rank + 1) % axis.size, axis.rank - 1)


def swap(x: Tensor, axis: Axis, peer: int) -> Tensor:
    """Hand a tensor to the rank at coordinate `peer`, and return the one that it hands over."""
    return _exchanged(x, axis, peer, peer)()


def _exchanged(x: Tensor, axis: Axis, to: int, source: int) -> Callable[[], Tensor]:
    """Start handing a tensor to the rank at coordinate `to`; the function returned waits for that of `source`."""
    buffer, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    if x.is_meta:
        return lambda: buffer
    compare = None if axis.roll_call is None else axis.roll_call.announce(axis, "exchange", x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, axis.ranks[to], group=axis.group),
            dist.P2POp(dist.irecv, buffer, axis.ranks[source], group=axis.group),
        ]
    )

    def wait() -> Tensor:
        if compare is not None:
            compare()
        with axis.waiting("exchange"):
            for work in works:
                work.wait()
        assert x.numel() == buffer.numel()  # x must live until it is sent
        return buffer

    return wait
