"""Low-rank adapters beside frozen linear layers: Y = X Wᵀ + (α/r) · X Aᵀ Bᵀ (Hu et al. 2021, arXiv:2106.09685).

An adapter is made of the linear layers that there are, so every layout, recomputation and weight gradients that are put
off serve it as they serve the layer that it stands beside:

    layer                A [r, n_in]                  B [n_out, r]                 between them
    column, W [f/tp, h]  whole on every rank          this rank's rows             [s/tp or s, b, r], then gathered
    row,    W [f, h/tp]  this rank's columns          whole on every rank          summed over tp, [s/tp or s, b, r]

B begins with zeros, so a new adapter changes nothing. A layer whose weight is several matrices fused (query, key and
value; gate and up) has one A for them all.

Experts have an adapter each, of grouped products, and the sum over tp comes after the last of them as it does anyway:

    up, W [E/ep, f/tp, h]      A [E/ep, r, h] whole over tp, its gradient a part of a sum      B [E/ep, f/tp, r]
    down, W [E/ep, h, f/tp]    A [E/ep, r, f/tp]             B [E/ep, h, r] whole over tp, its gradient a part of a sum

What the adapters stand beside may be packed in 4 bits (`nf4`).

Legend: `r` rank of the adapter; others as in `linear` and `experts`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from megascratch.config import LoraConfig
from megascratch.dist.layout import Init, Matrices, ParamSpec, Split, spec_of
from megascratch.errors import ConfigError, Problem
from megascratch.nn.experts import Experts, grouped_linear
from megascratch.nn.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megascratch.nn.nf4 import PackedWeight

MARK = ".adapter."  # in the names of its parameters: layers.0.attn.qkv.adapter.down.weight


class Adapter(nn.Module):
    """What is added to a layer's output.

    Args:
        lora: rank and scale.

    Attributes:
        active: False while the layer is to compute as if it had none.
    """

    def __init__(self, lora: LoraConfig) -> None:
        super().__init__()
        self.scale, self.active = lora.alpha / lora.rank, True


class LinearAdapter(Adapter):
    """Of a linear layer.

    Args:
        layer: whose weight it adapts.
        lora: rank and scale.
    """

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, lora: LoraConfig) -> None:
        super().__init__(lora)
        assert isinstance(layer.weight, Tensor)
        spec, at = spec_of(layer.weight), layer.placement
        n_out, n_in = spec.shape
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, ColumnParallelLinear):
            blocks = spec.splits[0].blocks
            self.down = ReplicatedLinear(n_in, lora.rank, at, std=_initial_std(n_in))
            self.up = ColumnParallelLinear(lora.rank, n_out, at, std=0.0, blocks=blocks, matrices=spec.matrices)
        else:
            self.down = RowParallelLinear(n_in, lora.rank, at, std=_initial_std(n_in))
            self.up = ReplicatedLinear(lora.rank, n_out, at, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input to what is added to its output."""
        return self.up(self.down(x)) * self.scale


class ExpertAdapter(Adapter):
    """Of one weight of all experts.

    Args:
        experts: whose weight it adapts.
        weight: the weight.
        lora: rank and scale.
    """

    def __init__(self, experts: Experts, weight: nn.Parameter, lora: LoraConfig) -> None:
        super().__init__(lora)
        spec, at = spec_of(weight), experts.placement
        n_experts, *rows, n_in = spec.shape
        over_ep, over_tp = spec.splits
        is_row = over_tp.dim == len(spec.shape) - 1
        self.later = at.weight_gradients
        self.down = at.parameter(
            n_experts,
            lora.rank,
            n_in,
            splits=(over_ep, Split(2, "tp")) if is_row else (over_ep,),
            grad_axes=() if is_row else ("tp",),
            init=Init(_initial_std(n_in)),
            matrices=Matrices((lora.rank,)),
        )
        self.up = at.parameter(
            n_experts,
            *rows,
            lora.rank,
            splits=(over_ep,) if is_row else (over_ep, over_tp),
            grad_axes=("tp",) if is_row else (),
            matrices=spec.matrices,
        )

    def forward(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map rows [n, i], so many of each expert, to what is added to the weight's products."""
        return (
            grouped_linear(grouped_linear(rows, self.down, sizes, self.later), self.up, sizes, self.later) * self.scale
        )


def _initial_std(n_in: int) -> float:
    """That of a uniform distribution within ±1/√n_in, which PEFT draws from."""
    return 1 / math.sqrt(3 * n_in)


def add_adapters(stage: nn.Module, lora: LoraConfig) -> None:
    """Put adapters beside the layers that are targeted, freeze all that fine-tuning does not add, pack what is to be.

    Args:
        stage: named, not yet initialised.
        lora: rank, scale, targets, and how the base is held.

    Raises: ConfigError: if a rank's part of a weight that is to be packed is no whole number of blocks.
    """
    modules = dict(stage.named_modules())
    for path, module in modules.items():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and is_target(f"{path}.weight", lora):
            module.adapter = LinearAdapter(module, lora)
            _name(module.adapter, path)
        elif isinstance(module, Experts):
            for name, weight in list(module.named_parameters(recurse=False)):
                if is_target(f"{path}.{name}", lora):
                    module.adapters[name] = ExpertAdapter(module, weight, lora)
                    _name(module.adapters[name], f"{path}.{name}")
    for param in stage.parameters():
        if not is_addition(spec_of(param).name):
            param.requires_grad_(False)
    for module in modules.values() if lora.base == "nf4" else ():
        for name, weight in list(module.named_parameters(recurse=False)):
            if is_packed(spec_of(weight)):
                delattr(module, name)
                setattr(module, name, PackedWeight(weight, module.placement))


def _name(adapter: nn.Module, weight: str) -> None:
    """Name an adapter's parameters after the weight, or the layer, that it stands beside."""
    for name, param in adapter.named_parameters():
        part = name.removesuffix(".weight")
        param.spec = replace(spec_of(param), name=f"{weight}{MARK}{part}.weight")  # type: ignore[attr-defined]


def is_packed(spec: ParamSpec) -> bool:
    """Return whether a weight is one that 4 bits can hold: of a layer's large products, those that tp divides."""
    return spec.name.startswith("layers.") and spec.matrices is not None and spec.is_split_over("tp")


def require_adapters(lora: LoraConfig, specs: Iterable[ParamSpec]) -> None:
    """Raise a ConfigError if none of a model's weights gets an adapter."""
    if not any(is_target(spec.name, lora) for spec in specs if spec.matrices is not None):
        rule = "name no linear layer of the model"
        raise ConfigError(Problem(f"lora.targets = {lora.targets}", rule, "for example attn.qkv"))


def is_target(weight: str, lora: LoraConfig) -> bool:
    """Return whether the layer of a weight, by its global name, gets an adapter."""
    within = weight.removesuffix(".weight").split(".", 2)[2:]  # without layers.<number>
    return bool(within) and any(fnmatchcase(within[0], target) for target in lora.targets)


def is_addition(name: str) -> bool:
    """Return whether a parameter is one that fine-tuning adds to a pretrained model: a scalar head, or an adapter."""
    return name == "score.weight" or MARK in name
