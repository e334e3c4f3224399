"""Models, shards and damaged manifests for the checkpoint tests and the ranks that they start."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megascratch.checkpoint import Shard, save
from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import Extent, ParamSpec, extents, run_extents
from megascratch.dist.mesh import Axis
from megascratch.nn import layer_range, parameter_specs

WORLD = Axis("world")


def tiny_config(**model: Any) -> Config:
    """Return a Llama of two layers whose sizes are all different, with grouped heads and an odd vocabulary."""
    shape = {
        "n_layers": 2,
        "hidden": 24,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 10,
        "ffn_hidden": 28,
        "vocab_size": 33,
        "max_seq_length": 64,
    }
    return config_from_dict({"model": {**shape, **model}, "data": {"seq_length": 32}, "train": {"dtype": "fp32"}})


def logical_tensors(config: Config, optimizer: bool = True) -> dict[str, Tensor]:
    """Return random values for every logical tensor, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    slots = ("", "optim/master/", "optim/exp_avg/", "optim/exp_avg_sq/") if optimizer else ("",)
    return {
        slot + spec.name: 0.2 * torch.randn(spec.shape, generator=generator)
        for spec in parameter_specs(config.model)
        for slot in slots
    }


def cut(
    name: str, value: Tensor, spec: ParamSpec, sizes: Mapping[str, int], coords: Mapping[str, int], fill: bool = True
) -> Shard:
    """Return a rank's n-dimensional part of a tensor; NaN where nothing was put."""
    storage = torch.full(spec.local_shape(sizes), float("nan"), dtype=value.dtype)
    own = extents(spec, sizes, coords)
    for extent in own if fill else ():
        storage[extent.local] = value[extent.logical]
    return Shard(name, spec.shape, storage, own)


def cut_run(shard: Shard, spec: ParamSpec, sizes: Mapping[str, int], coords: Mapping[str, int]) -> Shard:
    """Return this data-parallel rank's run of a shard, as ZeRO cuts it: as even as the count allows."""
    numel, dp, rank = shard.tensor.numel(), sizes.get("dp", 1), coords.get("dp", 0)
    start, stop = rank * numel // dp, (rank + 1) * numel // dp
    own: list[Extent] = run_extents(spec, sizes, coords, start, stop)
    return Shard(shard.name, shard.shape, shard.tensor.view(-1)[start:stop].clone(), own)


def rank_shards(
    config: Config, values: Mapping[str, Tensor], sizes: Mapping[str, int], coords: Mapping[str, int], fill: bool = True
) -> list[Shard]:
    """Return what a rank holds: its stage's weights, and its ZeRO runs of their optimizer state."""
    tp, pp = sizes.get("tp", 1), sizes.get("pp", 1)
    own_layers = layer_range(config.model.n_layers, coords.get("pp", 0), pp)
    result = []
    for spec in parameter_specs(config.model, tp=tp):
        head, _, rest = spec.name.partition(".")
        if head == "layers":
            here = int(rest.partition(".")[0]) in own_layers
        else:
            here = coords.get("pp", 0) == (pp - 1 if head in ("norm", "head") else 0)
        if not here:
            continue
        replica = not spec.splits and coords.get("tp", 0) > 0
        for name in (n for n in values if n.split("/")[-1] == spec.name):
            shard = cut(name, values[name], spec, sizes, coords, fill)
            if name.startswith("optim/"):
                shard, writes = cut_run(shard, spec, sizes, coords), not replica
            else:
                writes = not replica and coords.get("dp", 0) == 0
            result.append(Shard(shard.name, shard.shape, shard.tensor, shard.extents, writes))
    return result


def write_checkpoint(root: Path, config: Config, values: Mapping[str, Tensor], step: int = 10) -> Path:
    """Save on one rank."""
    state = {"config": config.model_dump(mode="json"), "consumed_samples": 80}
    return save(root, step, rank_shards(config, values, {}, {}), state, WORLD)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it a right checksum again, as an attacker would."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    manifest["xxh3"] = ""
    text = json.dumps(manifest, separators=(",", ":"))
    manifest["xxh3"] = xxhash.xxh3_64_hexdigest(text.encode())
    path.write_text(json.dumps(manifest, separators=(",", ":")))
