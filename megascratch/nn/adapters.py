"""Low-rank adapters beside frozen linear layers: Y = X Wᵀ + (α/r) · X Aᵀ Bᵀ (Hu et al. 2021, arXiv:2106.09685).

An adapter is made of the linear layers that there are, so every layout, recomputation and weight gradients that are put
off serve it as they serve the layer that it stands beside:

    layer                A [r, n_in]                  B [n_out, r]                 between them
    column, W [f/tp, h]  whole on every rank          this rank's rows             [s/tp or s, b, r], then gathered
    row,    W [f, h/tp]  this rank's columns          whole on every rank          summed over tp, [s/tp or s, b, r]

B begins with zeros, so a new adapter changes nothing. A layer whose weight is several matrices fused (query, key and
value; gate and up) has one A for them all.

Legend: `r` rank of the adapter; others as in `linear`.
"""

import math
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from megascratch.config import LoraConfig
from megascratch.dist.layout import spec_of
from megascratch.nn.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

MARK = ".adapter."  # in the names of its parameters: layers.0.attn.qkv.adapter.down.weight


class Adapter(nn.Module):
    """What is added to a layer's output.

    Args:
        layer: whose weight it adapts.
        lora: rank and scale.

    Attributes:
        active: False while the layer is to compute as if it had none.
    """

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, lora: LoraConfig) -> None:
        super().__init__()
        spec, at = spec_of(layer.weight), layer.placement
        n_out, n_in = spec.shape
        std = 1 / math.sqrt(3 * n_in)  # that of a uniform distribution within ±1/√n_in, which PEFT draws from
        self.scale, self.active = lora.alpha / lora.rank, True
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, ColumnParallelLinear):
            blocks = spec.splits[0].blocks
            self.down = ReplicatedLinear(n_in, lora.rank, at, std=std)
            self.up = ColumnParallelLinear(lora.rank, n_out, at, std=0.0, blocks=blocks, matrices=spec.matrices)
        else:
            self.down = RowParallelLinear(n_in, lora.rank, at, std=std)
            self.up = ReplicatedLinear(lora.rank, n_out, at, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input to what is added to its output."""
        return self.up(self.down(x)) * self.scale


def add_adapters(stage: nn.Module, lora: LoraConfig) -> None:
    """Put adapters beside the layers that are targeted, and freeze all that fine-tuning does not add.

    Args:
        stage: named, not yet initialised.
        lora: rank, scale and targets.
    """
    layers = dict(stage.named_modules())
    for path, layer in layers.items():
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and is_target(f"{path}.weight", lora):
            layer.adapter = Adapter(layer, lora)
            for name, param in layer.adapter.named_parameters():
                param.spec = replace(spec_of(param), name=f"{path}{MARK}{name}")  # type: ignore[attr-defined]
    for param in stage.parameters():
        if not is_addition(spec_of(param).name):
            param.requires_grad_(False)


def is_target(weight: str, lora: LoraConfig) -> bool:
    """Return whether the layer of a weight, by its global name, gets an adapter."""
    within = weight.removesuffix(".weight").split(".", 2)[2:]  # without layers.<number>
    return bool(within) and any(fnmatchcase(within[0], target) for target in lora.targets)


def is_addition(name: str) -> bool:
    """Return whether a parameter is one that fine-tuning adds to a pretrained model: a scalar head, or an adapter."""
    return name == "score.weight" or MARK in name
