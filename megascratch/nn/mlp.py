"""The feed-forward half of a block: expand, activate, contract; gated or not."""

from collections.abc import Callable

from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.nn.linear import ColumnParallelLinear, RowParallelLinear
from megascratch.nn.placement import Placement

GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": ops.swiglu,
    "geglu": ops.geglu,
    "geglu_tanh": ops.geglu_tanh,
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": ops.gelu,
    "gelu_tanh": ops.gelu_tanh,
    "relu2": ops.relu_squared,
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), with gate and up fused into one product (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, model: ModelConfig, placement: Placement, *, out_std: float) -> None:
        super().__init__()
        h, f = model.hidden, model.ffn_hidden
        self.placement, self.activation = placement, GATED[model.activation]
        self.gate_up = ColumnParallelLinear(h, 2 * f, placement, std=model.init_std, blocks=(f, f), bias=model.bias)
        self.down = RowParallelLinear(f, h, placement, std=out_std, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [s/tp or s, b, h] to the same shape."""
        return self.down(self.placement.activations.part("mlp_act", self.activation, self.gate_up(x)))


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, model: ModelConfig, placement: Placement, *, out_std: float) -> None:
        super().__init__()
        self.placement, self.activation = placement, PLAIN[model.activation]
        self.up = ColumnParallelLinear(model.hidden, model.ffn_hidden, placement, std=model.init_std, bias=model.bias)
        self.down = RowParallelLinear(model.ffn_hidden, model.hidden, placement, std=out_std, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [s/tp or s, b, h] to the same shape."""
        return self.down(self.placement.activations.part("mlp_act", self.activation, self.up(x)))


def make_mlp(model: ModelConfig, placement: Placement, *, out_std: float) -> nn.Module:
    """Return the feed-forward layer that the activation asks for."""
    return (GatedMLP if model.activation in GATED else PlainMLP)(model, placement, out_std=out_std)
