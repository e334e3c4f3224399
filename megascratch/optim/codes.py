"""Linear weights that travel between ranks in fp8, in half of the bytes.

Under ZeRO every rank updates its run of a bucket and uses the weights of all. Layers that multiply in fp8 use them
quantised; so each rank quantises its run, and these codes are gathered (`parallel.fp8_param_gather`). By hand, a weight
of 6 elements over two ranks, e4m3, whose largest number is 448:

    runs           0.5 −2 0.3            1 0.25 −4
    largest        2                     4              agreed: 4, so α = 448 / 4 = 112, and the unit is 1 / 112
    codes          56 −224 32            112 28 −448    33.6 rounds to 32
    gathered       56 −224 32 112 28 −448 on both

Those are the bytes of quantising the whole weight, so a run is the same bit for bit. The largest magnitudes of all
weights are agreed on in one collective, after every update. The whole values are with nobody: a run keeps its part.

Source: Megatron-LM's `--fp8-param-gather`; torchao's `precompute_float8_dynamic_scale_for_fsdp`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.nn.fp8 import FORWARD, scale_and_unit
from megascratch.optim.divided import Divided


class Codes:
    """The codes of one bucket's weights.

    Args:
        bounds: where each weight begins and ends in the bucket.
        values: [numel], where the layers compute; their own numbers are not read.
        run: this rank's values, in the model's dtype.
        start: where the run begins in the bucket.
        axis, waiting, lasts: of `Divided`.

    Attributes:
        divided: uint8, [numel].
        units: [n], what a code of each weight stands for, float32.
    """

    def __init__(
        self,
        bounds: Sequence[tuple[int, int]],
        values: Tensor,
        run: Tensor,
        start: int,
        axis: Axis,
        waiting: Axis,
        lasts: bool,
    ) -> None:
        self.bounds, self.run = bounds, run
        # Where the run has its part of each weight; the second is not above the first where it has none.
        self._parts = [(max(first - start, 0), max(min(last - start, len(run)), 0)) for first, last in bounds]
        own = torch.zeros_like(run, dtype=torch.uint8, pin_memory=run.is_pinned())
        self.divided = Divided(torch.zeros_like(values, dtype=torch.uint8), own, axis, waiting, lasts)
        self.divided.release()
        self.units = torch.ones(len(bounds), device=values.device)

    def magnitudes(self) -> Tensor:
        """Return the largest magnitude of this rank's part of each weight, [n]."""
        parts = [self.run[first:last] for first, last in self._parts]
        found = [torch.linalg.vector_norm(part, ord=torch.inf) if len(part) else part.new_zeros(()) for part in parts]
        return torch.stack(found).float().to(self.units.device)

    @torch.no_grad()
    def quantize(self, magnitudes: Tensor) -> None:
        """Quantise this rank's run by the largest magnitude of each weight, [n]."""
        scales, units = scale_and_unit(magnitudes, FORWARD)
        self.units.copy_(units)
        largest = torch.finfo(FORWARD).max
        for (first, last), scale in zip(self._parts, scales.to(self.run.device)):
            if first < last:
                rounded = (self.run[first:last].float() * scale).clamp(-largest, largest).to(FORWARD)
                self.divided.run[first:last] = rounded.view(torch.uint8)

    def of(self, index: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return a weight's codes [f, h], in fp8, and their unit; needed, and not yet released."""
        first, last = self.bounds[index]
        return self.divided.whole[first:last].view(FORWARD).view(shape), self.units[index]


def quantize_all(codes: Sequence[Codes]) -> None:
    """Quantise anew, after values have changed. Every rank of the axis, which is one for all, calls this."""
    if codes:
        sizes = [len(each.bounds) for each in codes]
        magnitudes = comm.max_over(torch.cat([each.magnitudes() for each in codes]), codes[0].divided.axis)
        for each, own in zip(codes, magnitudes.split(sizes)):
            each.quantize(own)
