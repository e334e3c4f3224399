"""`Activations`: what a layer's forward keeps for its backward, and what is computed again instead.

Autograd asks, for every tensor that an operation saves, what to keep in its place. Here a layer answers:

    the tensor itself                             usually
    a copy in host memory                         with `offload`
    "result 0 of running this function again"     for the result, and all inside, of a part that is to be recomputed

By hand, for y = norm(x) and z = y Wᵀ, with the part "layernorm" recomputed:

    forward    norm saves x and rstd     x is the part's input: kept; rstd was made inside: number 0
               the product saves y       the part's result
    backward   the product asks for y    norm(x) runs again and gives y and number 0; y is used and freed
               norm asks for rstd        it is there

So the memory of y and rstd is saved between forward and backward, and nothing is computed again but the norm. What is
computed again comes from the same operations on the same numbers, so gradients are equal bit for bit; dropout depends
on indices alone (`nn.sequence`) and needs no generator state. The graph is the first one throughout: a schedule can
split the backward, and hooks on parameters see nothing of this.

Sources: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, section 4 (selective).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])
Saved = Tensor | Callable[[], Tensor]  # what is kept in place of a tensor: itself, or what brings it back

# Smaller tensors stay where they are: a transfer costs some ten microseconds, whatever its size.
_LEAST_OFFLOAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Recompute:
    """What one layer does not keep.

    Attributes:
        parts: names of the parts that are computed again; `config.schema.RecomputeModule` lists them.
        whole: keep the layer's input alone, and compute all of the layer again.
        offload: keep in host memory what is kept.
    """

    parts: frozenset[str] = frozenset()
    whole: bool = False
    offload: bool = False


NOTHING, WHOLE = Recompute(), Recompute(whole=True)


class Activations:
    """Hands layers their answer to autograd. One a rank, in `Placement`; a layer names its parts, and decides nothing.

    Args:
        on_keep: is shown every tensor that is kept, for who wants to count them.
    """

    def __init__(self, on_keep: Callable[[Tensor], None] | None = None) -> None:
        self._on_keep = on_keep
        self._layer: _Layer | None = None

    def run(self, plan: Recompute, layer: torch.nn.Module, x: Tensor, *args: Any) -> Tensor:
        """Return `layer(x, *args)`, keeping what the plan says."""
        if not torch.is_grad_enabled() or (plan == NOTHING and self._on_keep is None):
            return layer(x, *args)
        assert self._layer is None, "a layer does not contain another"
        lasting = [*layer.parameters(), *_tensors(args)] if plan.offload else []
        self._layer = _Layer(plan, lasting, self._on_keep)
        try:
            with saved_tensors_hooks(self._layer.pack, _unpack):
                return self._layer.run(layer, x, *args) if plan.whole else layer(x, *args)
        finally:
            self._layer.forget()
            self._layer = None

    def part(self, name: str, function: Callable[..., Result], *args: Any) -> Result:
        """Return `function(*args)`, which is computed again in backward if the layer's plan names this part.

        Args:
            name: of the part.
            function: gives a tensor or several, from nothing but its arguments and parameters, without side effects.
            args: tensors and other values.
        """
        if self._layer is None or name not in self._layer.plan.parts:
            return function(*args)
        return self._layer.run(function, *args)

    def note(self, name: str, result: Tensor, function: Callable[..., Tensor], *args: Any) -> None:
        """Take note that `function(*args)` gives a result again, to the bit, that was computed in another way.

        For a fused operation, some of whose results are kept, and are enough to make the others from.
        """
        if self._layer is not None and name in self._layer.plan.parts:
            self._layer.know(_Run(function, args, self._layer.pack), result)


class _Layer:
    """One forward of one layer: what autograd saves meanwhile comes to `pack`."""

    def __init__(self, plan: Recompute, lasting: Iterable[Tensor], on_keep: Callable[[Tensor], None] | None) -> None:
        self.plan, self.on_keep = plan, on_keep
        self.lasting = {_storage(x) for x in lasting}  # parameters and tables: no activations, whoever saves them
        self.on_host: dict[_Place, Callable[[], Tensor]] = {}
        self.results: dict[int, tuple[_Run, int, Tensor]] = {}
        self.alive: list[Tensor] = []  # so that no other tensor takes the storage of one that is known here

    def pack(self, x: Tensor) -> Saved:
        """Answer autograd: what to keep in place of x."""
        if (made := self.results.get(_storage(x))) is not None:
            run, index, result = made
            if _place(x) == _place(result):
                return partial(run.result, index)
            if x.is_contiguous() and result.is_contiguous() and x.numel() == result.numel():
                return partial(_viewed, partial(run.result, index), x.shape)
        return self.keep(x)

    def keep(self, x: Tensor) -> Saved:
        """Keep x, here or in host memory."""
        x = x.detach()  # an operation that kept its own result would be a ring, which lasts where no backward comes
        if self.on_keep is not None:
            self.on_keep(x)
        if not self.plan.offload or _storage(x) in self.lasting or x.nbytes < _LEAST_OFFLOAD_BYTES:
            return x
        place = _place(x)
        if place not in self.on_host:
            self.alive.append(x)
            self.on_host[place] = _offloaded(x)
        return self.on_host[place]

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a function whose insides are dropped, and know its results when they are saved."""
        run = _Run(function, args, self.pack)
        result = run.forward(args)
        self.know(run, result)
        return result

    def know(self, run: "_Run", result: Tensor | tuple[Tensor, ...]) -> None:
        """Know the results of a run when they are saved."""
        for index, x in enumerate(_tensors(result)):
            self.results[_storage(x)] = (run, index, x)

    def forget(self) -> None:
        """Let go of the layer's tensors; autograd may hold on to the hooks themselves."""
        self.results, self.alive, self.on_host = {}, [], {}


class _Run:
    """A function and its arguments, to be run again, once, when the first of its tensors is asked for."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], keep: Callable[[Tensor], Saved]) -> None:
        self.function = function
        self.tensors = {i: (keep(x.detach()), x.requires_grad) for i, x in enumerate(args) if isinstance(x, Tensor)}
        self.others = [None if isinstance(x, Tensor) else x for x in args]
        self.n_dropped = 0
        self.dropped: dict[int, Tensor] = {}
        self.results: tuple[Tensor, ...] = ()

    def forward(self, args: tuple[Any, ...]) -> Any:
        """Run it for the first time: arguments are kept anyway, all else that is saved gets a number."""
        known = {_place(args[i]): saved for i, (saved, _) in self.tensors.items()}

        def drop(x: Tensor) -> Saved:
            if (saved := known.get(_place(x))) is not None:
                return saved
            self.n_dropped += 1
            return partial(self.inside, self.n_dropped - 1)

        with saved_tensors_hooks(drop, _unpack):
            return self.function(*args)

    def inside(self, number: int) -> Tensor:
        """Return the tensor that was dropped under a number; each is asked for once."""
        if number not in self.dropped:
            self.again(stop_early=True)
        return self.dropped.pop(number)

    def result(self, index: int) -> Tensor:
        """Return one of the results."""
        if not self.results:
            self.again(stop_early=False)
        return self.results[index]

    def again(self, stop_early: bool) -> None:
        """Run the function once more, and collect what it saves under the same numbers.

        Args:
            stop_early: whether it may end with the last tensor saved: what follows only makes the result.
        """
        args: list[Any] = list(self.others)
        for i, (saved, requires_grad) in self.tensors.items():
            args[i] = _unpack(saved).detach().requires_grad_(requires_grad)
        known = {_place(args[i]) for i in self.tensors}
        found: list[Tensor] = []

        def collect(x: Tensor) -> None:
            # Nothing goes back through this graph, so it keeps nothing. What is found must not hold on to it either:
            # a ring of graph, hook and list, of which Python's collector sees only a part, would stay for ever.
            if _place(x) not in known:
                found.append(x.detach())
                if stop_early and len(found) == self.n_dropped:
                    raise _AllFound

        with torch.enable_grad(), saved_tensors_hooks(collect, _unpack), suppress(_AllFound):
            self.results = tuple(x.detach() for x in _tensors(self.function(*args)))
        if self.n_dropped:  # of a result that was made in another way, the insides were kept
            assert len(found) == self.n_dropped, "a function that is computed again must save the same tensors"
            self.dropped = dict(enumerate(found))


class _AllFound(Exception):
    """Ends a function that runs again, when everything that is needed of it is there."""


_Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def _storage(x: Tensor) -> int:
    """Return what identifies a tensor's memory while it lives, on the meta device too, where it has no address."""
    return x.untyped_storage()._cdata


def _place(x: Tensor) -> _Place:
    """Return what two tensors have in common if and only if they are the same elements in the same order."""
    return _storage(x), int(x.storage_offset()), tuple(x.shape), x.stride()


def _unpack(saved: Saved) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()


def _viewed(fetch: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    return fetch().view(shape)


def _offloaded(x: Tensor) -> Callable[[], Tensor]:
    """Copy x to host memory; the function returned brings it back.

    On CUDA both copies are queued on the stream that computes, to and from pinned memory: neither needs an event.
    """
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)
    device = x.device
    return lambda: host.to(device, non_blocking=True, copy=True)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results, tuples of them included."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
