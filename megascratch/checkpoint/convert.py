"""Rewrite a checkpoint into the pieces of another layout, with no process group and a piece at a time.

Loading does not need this: any layout loads any checkpoint. It is for a checkpoint that is read often (each rank then
reads one file from end to end), for dropping the optimizer, and for another dtype. One file is written for each
(pipeline, tensor) rank, and at any time one of its pieces is in memory.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from megascratch.checkpoint.format import CHUNK_BYTES, DTYPES, OPTIMIZER, Manifest, TensorRecord, damage, whole
from megascratch.checkpoint.load import Reader, find, tensor_shard
from megascratch.checkpoint.save import NewPiece, new_directory, write_contents, write_pieces
from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import Box, ParamSpec, extents
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import DTYPES as TRAIN_DTYPES
from megascratch.nn import layer_range, parameter_specs


def convert(
    src: Path,
    dst: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    weights_only: bool = False,
    console: Console,
) -> Path:
    """Write the checkpoint `dst` with the tensors of `src`, laid out for tp × pp ranks.

    Args:
        src: a checkpoint, or a directory with `latest`.
        dst: directory of the new checkpoint; must not exist.
        tp, pp: sizes of the new layout.
        dtype: of the weights: fp64, fp32, bf16 or fp16; unchanged when left out. Optimizer state holds its own copy of
            the weights, so it must be left behind.
        weights_only: leave the optimizer state out.
        console: for progress.

    Returns: `dst`.

    Raises:
        CheckpointError: if the source is missing or damaged, or `dst` exists.
        ConfigError: if the model cannot be laid out so.
    """
    reader = Reader(find(src))
    config = _relaid(reader, tp, pp, dtype)
    has_optimizer = any(name.startswith(OPTIMIZER) for name in reader.manifest.tensors)
    if dtype is not None and has_optimizer and not weights_only:
        problem = Problem(f"dtype = {dtype}", "would part the weights from the optimizer's copy", "add weights_only")
        raise CheckpointError(problem, str(src))
    layout = Layout.of(config, tp, pp)
    layout.check(reader)
    tensors = {n: r for n, r in reader.manifest.tensors.items() if not (weights_only and n.startswith(OPTIMIZER))}

    def pieces(stage: int, rank: int) -> Iterator[NewPiece]:
        for name, record in tensors.items():
            saved = DTYPES[record.dtype]
            target = TRAIN_DTYPES[dtype] if dtype and saved.is_floating_point else saved
            for box in layout.boxes(name, record, stage, rank):
                value = partial(_read_box, reader, name, record, box, target)
                yield NewPiece(name, record.shape, target, box, value)

    state = reader.state()
    # Without the optimizer a run cannot be continued, so nothing stays that says where it stood.
    kept = {key: state[key] for key in state if key in ("step", "consumed_samples") or not weights_only}
    total = sum(record.numel for record in tensors.values())
    with new_directory(dst) as folder, progress(console, f"converting {src}", total, "elements") as advance:
        tables = []
        for stage in range(pp):
            for rank in range(tp):
                path = folder / f"pp_{stage:03d}_tp_{rank:03d}.safetensors"
                tables.append(write_pieces(path, pieces(stage, rank), advance))
        new_state = {**kept, "config": config.model_dump(mode="json")}
        state_bytes = json.dumps(new_state, indent=1, allow_nan=False).encode()
        manifest = Manifest.build(reader.manifest.step, tables, CHUNK_BYTES, state_bytes, dst)
        write_contents(folder, manifest, state_bytes)
    return dst


@dataclass(frozen=True)
class Layout:
    """Which boxes of which tensors a (stage, tensor-parallel rank) holds."""

    n_layers: int
    specs: Mapping[str, ParamSpec]
    tp: int
    pp: int

    @classmethod
    def of(cls, config: Config, tp: int, pp: int) -> "Layout":
        specs = parameter_specs(config.model, tp=tp)
        return cls(config.model.n_layers, {spec.name: spec for spec in specs}, tp, pp)

    def check(self, reader: Reader) -> None:
        """Raise a CheckpointError if the checkpoint lacks a parameter, or has a tensor of another shape."""
        for name in self.specs.keys() - reader.manifest.tensors.keys():
            raise damage(reader.directory, f"tensor {name}", "is not in the checkpoint")
        for name, record in reader.manifest.tensors.items():
            spec = self.specs.get(_parameter_of(name))
            if spec is not None and spec.shape != record.shape:
                rule = f"has shape {list(record.shape)}, its configuration says {list(spec.shape)}"
                raise damage(reader.directory, f"tensor {name}", rule)

    def boxes(self, name: str, record: TensorRecord, stage: int, rank: int) -> list[Box]:
        """Return the boxes in the logical tensor. Optimizer state lies as its parameter does."""
        parameter = _parameter_of(name)
        spec = self.specs.get(parameter)
        if stage != (self._stage(parameter) if spec else 0):
            return []
        if spec is None or not spec.splits:  # every rank holds it; one copy on disk is enough
            return [whole(record.shape)] if rank == 0 else []
        return [extent.logical for extent in extents(spec, {"tp": self.tp}, {"tp": rank})]

    def _stage(self, parameter: str) -> int:
        head, _, rest = parameter.partition(".")
        if head == "layers":
            layer = int(rest.partition(".")[0])
            return next(s for s in range(self.pp) if layer in layer_range(self.n_layers, s, self.pp))
        return self.pp - 1 if head in ("norm", "head", "mtp") else 0


def _relaid(reader: Reader, tp: int, pp: int, dtype: str | None) -> Config:
    """Return the configuration of a checkpoint with another layout and dtype, checked."""
    config = reader.config().model_dump()
    parallel = config["parallel"]
    kept = [key for key in parallel if key == "zero" or key.startswith(("recompute", "memory_budget"))]
    config["parallel"] = {"tp": tp, "pp": pp, **{key: parallel[key] for key in kept}}
    if dtype is not None:
        if dtype not in TRAIN_DTYPES:
            raise CheckpointError(Problem(f"dtype = {dtype}", "is not a dtype", f"use {', '.join(TRAIN_DTYPES)}"))
        config["train"]["dtype"] = dtype
    return config_from_dict(config, where=f"the layout tp = {tp}, pp = {pp} for {reader.directory}")


def _parameter_of(name: str) -> str:
    """Return the parameter that a tensor belongs to: optim/exp_avg/norm.weight belongs to norm.weight."""
    return name.split("/", 2)[-1] if name.startswith(OPTIMIZER) else name


def _read_box(reader: Reader, name: str, record: TensorRecord, box: Box, dtype: torch.dtype) -> Tensor:
    shard = tensor_shard(name, record, box, dtype)
    reader.fill([shard])
    return shard.tensor
