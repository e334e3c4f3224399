"""What a block must know of its tokens besides their activations, and dropout that no layout can change."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megascratch.nn.placement import Placement
from megascratch.ops.random import keep_mask, random_bits, stream_key


@dataclass(frozen=True)
class SequenceInfo:
    """The place of a micro-batch's tokens in their sequences and in the data.

    Attributes:
        length: tokens of each sequence in this forward pass on this rank of cp, s.
        offset: position of the first of them; more than 0 only in cached generation.
        positions: [b, s] int64 where they restart within a sequence, are divided over cp, or differ between sequences
            in cached generation; else None: offset … offset + s − 1.
        n_cached: length of the cache that tokens at `positions` read: the largest position + 1. None elsewhere.
        documents: [b, s] int64, the number of each token's document; no token attends to another document's. None for
            one document.
        sample_ids: [b] int64, the global index of each sample; dropout masks depend on it. None outside training.
        seed: of dropout.
        loss_tokens: [b], tokens of each whole sequence that count in the loss: what a layer's own loss weighs it by.
            None where nothing is learned.
        loss_seed: gradient of the loss that a layer's own loss is added to, a scalar.
        notes: where layers leave statistics, by their global name. Running a layer again leaves the same ones.
    """

    length: int
    offset: int = 0
    positions: Tensor | None = None
    n_cached: int | None = None
    documents: Tensor | None = None
    sample_ids: Tensor | None = None
    seed: int = 0
    loss_tokens: Tensor | None = None
    loss_seed: float | Tensor = 1.0
    notes: dict[str, Tensor] = field(default_factory=dict)


class Dropout(nn.Module):
    """Zero elements with probability p, each by its own (seed, site, sample, index): the same on every layout.

    Recompute draws the same mask again with no saved state.

    Args:
        site: name of this use, unique in the model.
        p: probability.
    """

    def __init__(self, site: str, p: float) -> None:
        super().__init__()
        self.site = site
        self.p = p

    def forward(self, x: Tensor, info: SequenceInfo, index: Tensor, sample_dim: int) -> Tensor:
        """Drop elements of x.

        Args:
            x: any shape.
            info: gives the samples and the seed.
            index: each element's index within its sample, int64, broadcastable to x with size 1 at `sample_dim`.
            sample_dim: dimension of x that counts the samples of the micro-batch.
        """
        if not self.training or self.p == 0.0:
            return x
        assert info.sample_ids is not None, "dropout needs sample ids"
        shape = [1] * x.dim()
        shape[sample_dim] = -1
        key = stream_key(info.seed, self.site)
        # Each sample's elements are counted from a place of its own among 2⁶⁴. A fixed stride between samples would
        # wrap: 2⁴⁴ elements apart, sample 2²⁰ would get the mask of sample 0.
        first = random_bits(key, info.sample_ids.to(x.device)).view(shape)
        keep = keep_mask(key, first + index, self.p)
        return x * keep.to(x.dtype) / (1.0 - self.p)


class ResidualDropout(Dropout):
    """Dropout of activations between blocks."""

    def __init__(self, site: str, p: float, placement: Placement) -> None:
        super().__init__(site, p)
        self.placement = placement

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # type: ignore[override]
        """Drop elements of x [s/tp or s, b, h]."""
        if not self.training or self.p == 0.0:
            return x
        s, _, h = x.shape
        first = self.placement.tp.rank * s if self.placement.sequence_parallel else 0
        token = torch.arange(first, first + s, device=x.device).view(s, 1, 1)
        return super().forward(x, info, token * h + torch.arange(h, device=x.device), sample_dim=1)
