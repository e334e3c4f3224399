"""Token embedding divided over the vocabulary, and learned positions.

Legend: `s` sequence, `b` micro-batch, `h` hidden, `v` vocabulary.

The vocabulary is padded so that it divides over any tp and fills whole tiles of a matrix product. Padding rows are
physical only: they are zero, no token reads them, no logit of theirs enters a loss, and no checkpoint holds them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascratch.dist import comm
from megascratch.dist.layout import Init, Split
from megascratch.nn.placement import Placement
from megascratch.nn.weight_gradients import main_grad

VOCABULARY_TILE = 64  # rows a rank is padded to: 128 bytes of 16-bit logits, what tensor cores want aligned


def vocabulary_split(vocab_size: int, tp: int) -> Split:
    """Return how a [v, h] weight is divided over tp ranks, with the padding that makes it divide."""
    return Split(0, "tp", pad=-vocab_size % (tp * VOCABULARY_TILE))


class _Lookup(torch.autograd.Function):
    """Rows of a weight [v, h] by index. Its gradient touches few rows: they are added to the main gradient in place."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        (rows,), total = ctx.saved_tensors, main_grad(ctx.weight)
        if total is None or grad.is_cuda:  # there index_add_ adds in no fixed order
            return None, torch.ops.aten.embedding_dense_backward(grad, rows, len(ctx.weight), -1, False)
        total.index_add_(0, rows.flatten(), grad.flatten(0, -2).to(total.dtype))
        return None, None


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding divided over tp: each rank looks up the tokens that it has, and a sum joins them."""

    def __init__(
        self, vocab_size: int, hidden: int, placement: Placement, *, std: float, grad_axes: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.placement = placement
        split = vocabulary_split(vocab_size, placement.tp.size)
        self.weight = placement.parameter(vocab_size, hidden, splits=(split,), grad_axes=grad_axes, init=Init(std))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens [b, s]. Returns: [s/tp, b, h] under sequence parallelism, else [s, b, h]."""
        return embed(tokens, self.weight, self.placement)


def embed(tokens: Tensor, weight: Tensor, placement: Placement) -> Tensor:
    """Look up tokens [b, s] in this rank's rows of the embedding, [v/tp, h], or of a head that is tied to it.

    Returns: [s/tp, b, h] under sequence parallelism, else [s, b, h].
    """
    tp = placement.tp
    local = tokens.t() - tp.rank * weight.shape[0]
    if tp.size == 1:
        return _Lookup.apply(local, weight)
    elsewhere = (local < 0) | (local >= weight.shape[0])
    x = _Lookup.apply(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return comm.reduce_scatter(x, tp) if placement.sequence_parallel else comm.all_reduce(x, tp)


class LearnedPositions(nn.Module):
    """A vector for each position, added to the token embeddings."""

    def __init__(self, length: int, hidden: int, placement: Placement, *, std: float) -> None:
        super().__init__()
        self.weight = placement.parameter(length, hidden, grad_axes=placement.token_axes, decay=False, init=Init(std))

    def forward(self, positions: Tensor) -> Tensor:
        """Look up positions of this rank's tokens, [s/tp or s, b]. Returns: [s/tp or s, b, h]."""
        return _Lookup.apply(positions, self.weight)


def local_positions(length: int, offset: int, placement: Placement) -> Tensor:
    """Return the positions of this rank's tokens, [s/tp] under sequence parallelism, else [s] (int64)."""
    parts = placement.tp.size if placement.sequence_parallel else 1
    part = length // parts
    first = offset + (placement.tp.rank * part if parts > 1 else 0)
    return torch.arange(first, first + part, device=placement.device)
