"""RMSNorm and LayerNorm over the last dimension.

The weight lies whole on every rank. Where the ranks of tp each normalise their own part of the tokens or heads, its
gradient is partial and is summed over tp (`grad_axes`).
"""

from torch import Tensor, nn

from megascratch import ops
from megascratch.dist.layout import Init
from megascratch.nn.placement import Placement


class RMSNorm(nn.Module):
    """x · w / √(mean(x²) + ε) (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, placement: Placement, grad_axes: tuple[str, ...]) -> None:
        super().__init__()
        self.eps = eps
        self.weight = placement.parameter(size, grad_axes=grad_axes, decay=False, init=Init(mean=1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and the sum itself, [..., size] each, in one pass."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / √(var + ε) · w + b (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, placement: Placement, grad_axes: tuple[str, ...]) -> None:
        super().__init__()
        self.eps = eps
        self.weight = placement.parameter(size, grad_axes=grad_axes, decay=False, init=Init(mean=1.0))
        self.bias = placement.parameter(size, grad_axes=grad_axes, decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and the sum itself, [..., size] each."""
        total = x + residual
        return self(total), total


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
