"""RMSNorm and LayerNorm over the last dimension, and RMSNorm over heads that tp divides.

The weight lies whole on every rank. Where the ranks of tp each normalise their own part of the tokens or heads, its
gradient is partial and is summed over tp (`grad_axes`).
"""

from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.dist.layout import Init, Split
from megascratch.nn.placement import Placement


class RMSNorm(nn.Module):
    """x · w / √(mean(x²) + ε) (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        size: of the last dimension.
        eps: ε.
        placement: where the weight lies.
        grad_axes: axes over which its gradient is partial.
        zero_centered: whether it multiplies by 1 + w, so that decay and half precision act around 1 (Gemma).
    """

    def __init__(
        self, size: int, eps: float, placement: Placement, grad_axes: tuple[str, ...], zero_centered: bool = False
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered
        init = Init(mean=0.0 if zero_centered else 1.0)
        self.weight = placement.parameter(size, grad_axes=grad_axes, decay=False, init=init)

    @property
    def scale(self) -> Tensor:
        """What it multiplies by, [size]."""
        return scale_of(self.weight, self.zero_centered)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return ops.rms_norm(x, self.scale, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and the sum itself, [..., size] each, in one pass."""
        return ops.add_rms_norm(x, residual, self.scale, self.eps)


def scale_of(weight: Tensor, zero_centered: bool) -> Tensor:
    """Return what a norm multiplies by; 1 + w in the type of sums, as a half-precision one would lose w's last bits."""
    return weight.to(ops.acc_dtype(weight)) + 1.0 if zero_centered else weight


class HeadsRMSNorm(nn.Module):
    """RMSNorm over all heads of a token together (OLMo 2, arXiv:2501.00656, section 3.3), which lie apart over tp.

    Each rank adds up the squares of its own heads, and one number a token is summed over tp.
    """

    def __init__(self, n_heads: int, head_dim: int, model: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.placement, self.eps, self.size = placement, model.norm_eps, n_heads * head_dim
        self.zero_centered = model.norm_zero_centered
        init = Init(mean=0.0 if self.zero_centered else 1.0)
        self.weight = placement.parameter(self.size, splits=(Split(0, "tp"),), decay=False, init=init)

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's heads [s, b, n/tp, d] to the same shape."""
        scale, tp = scale_of(self.weight, self.zero_centered), self.placement.tp
        if tp.size == 1:
            return ops.rms_norm(x.flatten(2), scale, self.eps).view(x.shape)
        wide = x.flatten(2).to(ops.acc_dtype(x))
        # Every rank goes on with the sum in its own way: backward sums what it means for each (`copy`).
        squares = comm.copy(comm.all_reduce(wide.square().sum(-1, keepdim=True), tp), tp)
        return (wide * (squares / self.size + self.eps).rsqrt() * scale).to(x.dtype).view(x.shape)


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


def rms_norm(model: ModelConfig, placement: Placement, grad_axes: tuple[str, ...], size: int) -> RMSNorm:
    """Return an RMSNorm of a size, as the model has them."""
    return RMSNorm(size, model.norm_eps, placement, grad_axes, model.norm_zero_centered)


def make_norm(model: ModelConfig, placement: Placement) -> RMSNorm | LayerNorm:
    """Return the norm of activations between layers that the model asks for."""
    axes = placement.token_axes
    if model.norm == "layernorm":
        return LayerNorm(model.hidden, model.norm_eps, placement, axes)
    return rms_norm(model, placement, axes, model.hidden)
