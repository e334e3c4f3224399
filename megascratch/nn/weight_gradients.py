"""`WeightGradients`: put the weight half of a backward pass off, to be done when nothing waits for it.

A linear layer's backward is two products: the gradient of its input, which the layer before needs, and the gradient of
its weight, which nobody needs before the optimizer. A zero-bubble schedule runs the first as I and the second as W:

    with put_off.collect() as owed:      I: backward as usual, but the linear layers leave their second product here
        y.backward()
    for compute in owed:                 W: any time later
        compute()

Each entry keeps two tensors alive, the layer's input and the gradient of its output; the graph itself is freed by I.
Weights of embeddings and norms, and biases, get their gradients in I: they are cheap, and a norm's comes out of the
same kernel as its input's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def main_grad(weight: Tensor) -> Tensor | None:
    """Return the sum over micro-batches that a parameter's gradient belongs in, like it but wide, or None.

    Whoever computes the gradient adds to it and hands autograd none; a gradient that autograd does get is added later.
    The parameter has a function for it, since a sum that ZeRO-2 divides is there only while gradients come in.
    """
    find: Callable[[], Tensor] | None = getattr(weight, "main_grad", None)
    return None if find is None else find()


class WeightGradients:
    """What the layers of one rank owe. It is handed to them by `Placement`; outside `collect` it takes nothing."""

    def __init__(self) -> None:
        self._owed: list[Callable[[], None]] | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether a backward pass should leave its weight gradients here."""
        return self._owed is not None

    def owe(self, compute: Callable[[], None]) -> None:
        """Put one off."""
        assert self._owed is not None
        self._owed.append(compute)

    @contextmanager
    def collect(self) -> Iterator[list[Callable[[], None]]]:
        """Collect, in the order of the backward pass, what it puts off."""
        assert self._owed is None, "one backward pass at a time"
        owed: list[Callable[[], None]] = []
        self._owed = owed
        try:
            yield owed
        finally:
            self._owed = None


def weight_gradient(
    weight: Tensor, compute: Callable[[], Tensor | None], later: WeightGradients | None
) -> Tensor | None:
    """Compute a weight's gradient now, or put it off where backward passes do.

    Args:
        compute: returns the gradient, or None where it was added to the weight's main gradient.
        later: takes what is put off while it collects.

    Returns: what autograd gets for the weight.
    """
    if later is None or not later.is_collecting:
        return compute()

    def finish() -> None:
        if (grad := compute()) is not None:
            torch.autograd.backward(weight, grad)  # from the weight itself: this ends in its own accumulation

    later.owe(finish)
    return None
