"""`TreeSum`: gradients of consecutive micro-batches, added in an order that the number of ranks does not change.

A data-parallel rank takes consecutive micro-batches. n = 2^k · q of them (q odd) make 2^k leaves of q each, and a
binary tree adds the leaves: its lower levels lie within ranks, its upper ones between them. By hand, n = 12, so q = 3:

    dp 1    ((g0+g1+g2) + (g3+g4+g5)) + ((g6+g7+g8) + (g9+g10+g11))
    dp 2     └───────── rank 0 ─────┘ + └────────── rank 1 ──────┘
    dp 4      └ rank 0 ┘ + └ rank 1 ┘ +   └ rank 2 ┘ + └─ rank 3 ─┘

As a binary counter carries, two subtrees of one height become one, so log₂ of the leaves are held at a time.
"""

import torch
from torch import Tensor


def leaf_length(n_microbatches: int) -> int:
    """Return q, how many micro-batches of a rank make a leaf: the same for every power of two of ranks."""
    return n_microbatches // (n_microbatches & -n_microbatches)


class TreeSum:
    """What one rank has added up of one step, as subtrees of falling height."""

    def __init__(self) -> None:
        self._subtrees: list[tuple[int, Tensor]] = []
        self._spare: list[Tensor] = []

    def add(self, leaf: Tensor) -> Tensor:
        """Take a leaf, which is changed, and return a tensor of zeros like it for the next one."""
        height = 0
        while self._subtrees and self._subtrees[-1][0] == height:
            _, left = self._subtrees.pop()
            self._spare.append(leaf)
            leaf = left.add_(leaf)
            height += 1
        self._subtrees.append((height, leaf))
        return self._spare.pop().zero_() if self._spare else torch.zeros_like(leaf)

    def total(self, unused: Tensor) -> Tensor:
        """Return the sum of the step, and take back the tensor for a leaf that did not come."""
        self._spare.append(unused)
        ((_, total),) = self._subtrees  # a power of two of leaves
        self._subtrees.clear()
        return total
