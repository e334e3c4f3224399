"""Weights that a checkpoint holds in 4 bits, seen as what they stand for: every format is written from that.

layers.0.attn.qkv.weight.{codes, scales, groups}   ─ unpacked ─►   layers.0.attn.qkv.weight
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megascratch.checkpoint.source import Kind, Latest, Source
from megascratch.dist.layout import Box
from megascratch.dist.mesh import Axis
from megascratch.nn import DTYPES, PackedWeight, Placement, parameter_specs


def unpacked(source: Source) -> Source:
    """Return a source without packed weights; another one is returned as it is."""
    if source.config.lora is None or source.config.lora.base == "full":
        return source
    dtype = DTYPES[source.config.train.dtype]
    placement = Placement(Axis("tp"), False, dtype, torch.device("cpu"))
    packed: dict[str, PackedWeight] = {}
    for spec in parameter_specs(source.config.model):
        if f"{spec.name}.codes" in source.kinds:
            weight = nn.Parameter(torch.empty(spec.shape, device="meta"))
            weight.spec = spec  # type: ignore[attr-defined]
            packed[spec.name] = PackedWeight(weight, placement)

    def values(name: str) -> Tensor:
        for part, param in packed[name].named_parameters():
            param.data.copy_(source.read(f"{name}.{part}"))
        return packed[name].unpacked()

    last = Latest(values)

    def read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
        return last(name)[box].to(dtype) if name in packed else source.read_box(name, box, dtype)

    inside = {spec for name in packed for spec in (f"{name}.codes", f"{name}.scales", f"{name}.groups")}
    kinds = {name: kind for name, kind in source.kinds.items() if name not in inside}
    kinds |= {name: Kind(dtype, weight.spec.shape) for name, weight in packed.items()}
    assert source.config.lora is not None
    lora = source.config.lora.model_copy(update={"base": "full"})
    return replace(source, config=source.config.model_copy(update={"lora": lora}), kinds=kinds, read_box=read)
