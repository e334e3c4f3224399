"""Conversion: between layouts, precisions and formats, with no process group and a tensor at a time.

Loading does not need the first: any layout loads any checkpoint. It is for a checkpoint that is read often (each rank
then reads one file from end to end), for dropping the optimizer, and for another dtype. One file is written for each
(pipeline, tensor) rank, and at any time one of its pieces is in memory.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from megascratch.checkpoint.adapters import merged, write_peft
from megascratch.checkpoint.dcp import METADATA, DcpFolder
from megascratch.checkpoint.format import CHUNK_BYTES, MANIFEST, OPTIMIZER, Manifest, damage, whole
from megascratch.checkpoint.hf import COMPANIONS, copy_companions, hf_source, write_dcp, write_hf
from megascratch.checkpoint.hf_folder import CONFIG, Folder, read_json
from megascratch.checkpoint.load import find
from megascratch.checkpoint.megatron import find_megatron, open_megatron
from megascratch.checkpoint.megatron_save import write_megatron, write_megatron_dist
from megascratch.checkpoint.packed import unpacked
from megascratch.checkpoint.pieces import NewPiece, new_directory, write_contents, write_pieces
from megascratch.checkpoint.source import Source, own, written_dtype
from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import Box, ParamSpec, extents
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import layer_range, parameter_specs

Format = Literal["megascratch", "hf", "dcp", "megatron", "megatron-dist", "peft"]


def convert(
    src: Path,
    dst: Path,
    *,
    from_: Format | None = None,
    to: Format = "megascratch",
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    weights_only: bool = False,
    family: str | None = None,
    tokenizer: Path | None = None,
    merge: bool = False,
    console: Console,
) -> Path:
    """Write `dst` with the tensors of `src`.

    Args:
        src: a checkpoint, a directory with `latest`, or a folder of another format.
        dst: directory of what is written; must not exist.
        from_: format of the source; recognised when left out.
        to: format that is written.
        tp, pp: sizes of the layout that is written for, in formats that have one.
        dtype: of the weights: fp64, fp32, bf16 or fp16; unchanged when left out. Optimizer state holds its own copy of
            the weights, so it must be left behind.
        weights_only: leave the optimizer state out; it never goes into other formats.
        family: name of the family in Hugging Face's format, where several express the model.
        tokenizer: of the model, for Hugging Face's format; the source's own when left out.
        merge: put adapters into the weights that they adapt, as every format but ours and PEFT's needs.
        console: for progress.

    Returns: `dst`.

    Raises:
        CheckpointError: if the source is missing or damaged, or `dst` exists.
        ConfigError: if the model cannot be laid out so.
    """
    source = unpacked(open_source(src, from_))
    if to == "peft":
        return write_peft(source, dst, console=console)
    if merge or (source.config.lora is not None and to != "megascratch"):
        source = merged(source)
    if source.config.model.head == "scalar" and to != "megascratch":
        rule = f"has a place in our checkpoints, not in {to}"
        raise CheckpointError(Problem("model.head = scalar", rule, "use it as it is"), str(source.path))
    if to == "megatron":
        return write_megatron(source, dst, tp=tp, pp=pp, dtype=dtype, console=console)
    if to == "megatron-dist":
        return write_megatron_dist(source, dst, dtype=dtype, console=console)
    if to in ("hf", "dcp"):
        if tokenizer is None and not (source.path / COMPANIONS[0]).is_file():
            tokenizer = _configured_tokenizer(source.config)
        write = write_hf if to == "hf" else write_dcp
        return write(source, dst, family=family, dtype=dtype, tokenizer=tokenizer, console=console)
    return write_own(source, dst, tp=tp, pp=pp, dtype=dtype, weights_only=weights_only, console=console)


def open_source(path: Path, format: Format | None = None) -> Source:
    """Open what is to be converted.

    Args:
        path: a checkpoint, a directory with `latest`, or a folder of another format.
        format: its format; recognised by its files when left out.

    Raises: CheckpointError: if it is missing or damaged, or says nothing of its model.
    """
    format = format or recognised(path)
    if format == "hf":
        folder = Folder.open(path)
        return hf_source(folder, folder.config)
    if format == "dcp":
        return hf_source(DcpFolder(path), read_json(path, CONFIG))
    if format in ("megatron", "megatron-dist"):
        if (found := find_megatron(path)) is None:
            raise damage(path, path.name, "is no checkpoint of Megatron-LM", "give a directory that it saved into")
        return open_megatron(found)
    return own(find(path))


def recognised(path: Path) -> Format:
    """Return the format of a folder, by the files that it has; ours where it is none of the others."""
    if (path / MANIFEST).is_file():
        return "megascratch"
    if find_megatron(path) is not None:
        return "megatron"
    if (path / METADATA).is_file():
        return "dcp"
    return "hf" if (path / CONFIG).is_file() else "megascratch"


def write_own(
    source: Source,
    dst: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    weights_only: bool = False,
    console: Console,
) -> Path:
    """Write a checkpoint of ours, laid out for tp × pp ranks; arguments and errors as for `convert`."""
    kinds = source.weights if weights_only else source.kinds
    targets = {name: written_dtype(kind.dtype, dtype) for name, kind in kinds.items()}
    has_optimizer = any(name.startswith(OPTIMIZER) for name in source.kinds)
    if dtype is not None and has_optimizer and not weights_only:
        problem = Problem(f"dtype = {dtype}", "would part the weights from the optimizer's copy", "add weights_only")
        raise CheckpointError(problem, str(source.path))
    config = _relaid(source, tp, pp, dtype)
    layout = Layout.of(config, tp, pp)
    layout.check(source)

    def pieces(stage: int, rank: int) -> Iterator[NewPiece]:
        for name, kind in kinds.items():
            for box in layout.boxes(name, kind.shape, stage, rank):
                asked = name, box, targets[name]
                value, blocks = partial(source.read, *asked), partial(source.blocks, *asked)
                yield NewPiece(name, kind.shape, targets[name], box, value, blocks)

    # Without the optimizer a run cannot be continued, so nothing stays that says where it stood.
    state = {key: source.state[key] for key in source.state if key in _PLACE or not weights_only}
    total = sum(math.prod(kind.shape) for kind in kinds.values())
    with new_directory(dst) as folder, progress(console, f"converting {source.path}", total, "elements") as advance:
        tables = []
        for stage in range(pp):
            for rank in range(tp):
                path = folder / f"pp_{stage:03d}_tp_{rank:03d}.safetensors"
                tables.append(write_pieces(path, pieces(stage, rank), advance))
        copy_companions(source.path, folder)
        if (folder / COMPANIONS[0]).exists():
            data = config.data.model_copy(update={"tokenizer": str(dst / COMPANIONS[0])})
            config = config.model_copy(update={"data": data})
        new_state = {"step": source.step, "consumed_samples": 0, **state, "config": config.model_dump(mode="json")}
        state_bytes = json.dumps(new_state, indent=1, allow_nan=False).encode()
        manifest = Manifest.build(source.step, tables, CHUNK_BYTES, state_bytes, dst)
        write_contents(folder, manifest, state_bytes)
    return dst


_PLACE = ("step", "consumed_samples")


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

    def check(self, source: Source) -> None:
        """Raise a CheckpointError if the checkpoint lacks a parameter, or has a tensor of another shape."""
        source.require(list(self.specs))
        for name, kind in source.kinds.items():
            spec = self.specs.get(_parameter_of(name))
            if spec is not None and spec.shape != kind.shape:
                rule = f"has shape {list(kind.shape)}, its configuration says {list(spec.shape)}"
                raise damage(source.path, f"tensor {name}", rule)

    def boxes(self, name: str, shape: tuple[int, ...], stage: int, rank: int) -> list[Box]:
        """Return the boxes in the logical tensor. Optimizer state lies as its parameter does."""
        parameter = _parameter_of(name)
        spec = self.specs.get(parameter)
        if stage != (self._stage(parameter) if spec else 0):
            return []
        if spec is None or not spec.splits:  # every rank holds it; one copy on disk is enough
            return [whole(shape)] if rank == 0 else []
        return [extent.logical for extent in extents(spec, {"tp": self.tp}, {"tp": rank})]

    def _stage(self, parameter: str) -> int:
        head, _, rest = parameter.partition(".")
        if head == "layers":
            layer = int(rest.partition(".")[0])
            return next(s for s in range(self.pp) if layer in layer_range(self.n_layers, s, self.pp))
        return self.pp - 1 if head in ("norm", "head", "mtp") else 0


def _relaid(source: Source, tp: int, pp: int, dtype: str | None) -> Config:
    """Return the configuration of a checkpoint with another layout and dtype, checked."""
    config = source.config.model_dump()
    parallel = config["parallel"]
    kept = [key for key in parallel if key == "zero" or key.startswith(("recompute", "memory_budget"))]
    config["parallel"] = {"tp": tp, "pp": pp, **{key: parallel[key] for key in kept}}
    if dtype is not None:
        config["train"]["dtype"] = dtype
    return config_from_dict(config, where=f"the layout tp = {tp}, pp = {pp} for {source.path}")


def _configured_tokenizer(config: Config) -> Path | None:
    """Return the tokenizer that a checkpoint's configuration names, if it is still there."""
    file = config.data.tokenizer
    return Path(file) if file and Path(file).exists() else None


def _parameter_of(name: str) -> str:
    """Return the parameter that a tensor belongs to: optim/exp_avg/norm.weight belongs to norm.weight."""
    return name.split("/", 2)[-1] if name.startswith(OPTIMIZER) else name
