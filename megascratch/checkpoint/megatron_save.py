"""Writing checkpoints of Megatron-LM, weights only, a tensor in memory at a time; the formats stand in `megatron`."""

import json
import math
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megascratch.checkpoint.megatron import COMMON, LATEST, SHARDED, megatron_names
from megascratch.checkpoint.megatron_args import write_arguments
from megascratch.checkpoint.pickles import StoredTensor, load_torch_file
from megascratch.checkpoint.pieces import new_directory
from megascratch.checkpoint.source import Kind, Source, written_dtype
from megascratch.dist.distributed_checkpoint import Chunk, write_chunks
from megascratch.dist.layout import ParamSpec, Split, extents
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import layer_range, parameter_specs

RELEASE = "release"  # what Megatron calls weights without a run
_ROWS = 128  # that it pads each rank's part of the vocabulary to a multiple of
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
Value = Callable[[], Tensor]


def write_megatron(
    source: Source, dst: Path, *, tp: int = 1, pp: int = 1, dtype: str | None = None, console: Console
) -> Path:
    """Write Megatron's legacy format, `release/mp_rank_*/model_optim_rng.pt`, for tp × pp ranks.

    Args:
        source: of the weights.
        dst: directory to make; must not exist.
        tp, pp: sizes of the layout.
        dtype: of the weights; unchanged when left out.
        console: for progress.

    Returns: `dst`.

    Raises: CheckpointError: if the source is damaged, `dst` exists, or the model is not one of Megatron's.
    """
    model = source.config.model
    if model.n_layers % pp:
        rule = f"must divide model.n_layers = {model.n_layers} in Megatron's format"
        raise CheckpointError(Problem(f"pp = {pp}", rule, "use another pp"))
    names = megatron_names(model)
    source.require(list(names))
    args = write_arguments(model, tp, pp, _padded_rows(model.vocab_size, tp))
    specs = {spec.name: _padded(spec, tp) for spec in parameter_specs(model, tp=tp)}
    total = sum(math.prod(source.kinds[name].shape) for name in names)
    with new_directory(dst) as folder, progress(console, f"exporting {source.path}", total, "elements") as advance:
        for stage in range(pp):
            held = _held(names, model.n_layers, model.tie_embeddings, stage, pp)
            for rank in range(tp):
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                (folder / RELEASE / name).mkdir(parents=True)
                tensors = {theirs: _local(source, ours, specs[ours], tp, rank, dtype) for theirs, ours in held.items()}
                rest = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}
                _write_rank(folder / RELEASE / name / "model_optim_rng.pt", rest, tensors, advance)
        (folder / LATEST).write_text(RELEASE)
    return dst


def _held(names: Mapping[str, str], n_layers: int, tied: bool, stage: int, pp: int) -> dict[str, str]:
    """Return our names of what a stage holds, by Megatron's names for it, whose layers are numbered from 0."""
    layers = layer_range(n_layers, stage, pp)
    held: dict[str, str] = {}
    for ours, theirs in names.items():
        head, _, rest = ours.partition(".")
        if head == "layers":
            layer = int(rest.partition(".")[0])
            if layer in layers:
                held[theirs.replace(f".layers.{layer}.", f".layers.{layer - layers.start}.", 1)] = ours
        elif stage == (pp - 1 if head in ("norm", "head") else 0):
            held[theirs] = ours
    if tied and pp > 1 and stage == pp - 1:
        held["output_layer.weight"] = "embed.weight"
    return held


def _padded_rows(vocab_size: int | None, tp: int) -> int:
    assert vocab_size is not None
    return -(-vocab_size // (_ROWS * tp)) * _ROWS * tp


def _padded(spec: ParamSpec, tp: int) -> ParamSpec:
    """Return a spec with the padding of the vocabulary that Megatron has."""
    if spec.name not in ("embed.weight", "head.weight"):
        return spec
    pad = _padded_rows(spec.shape[0], tp) - spec.shape[0]
    return ParamSpec(spec.name, spec.shape, (Split(0, "tp", pad=pad),))


def _local(source: Source, name: str, spec: ParamSpec, tp: int, rank: int, dtype: str | None) -> tuple[Kind, Value]:
    """Return what a rank holds of a tensor: its kind, and what makes it."""
    target = written_dtype(source.kinds[name].dtype, dtype)
    shape = spec.local_shape({"tp": tp})

    def value() -> Tensor:
        if shape == spec.shape:
            return source.read(name, dtype=target)
        local = torch.zeros(shape, dtype=target)
        for extent in extents(spec, {"tp": tp}, {"tp": rank}):
            local[extent.local] = source.read(name, extent.logical, target)
        return local

    return Kind(target, shape), value


def _write_rank(
    path: Path, rest: Mapping[str, Any], tensors: Mapping[str, tuple[Kind, Value]], advance: Callable[[float], None]
) -> None:
    """Write a file of torch.save: first with room for the tensors, then each where its bytes belong."""
    with FakeTensorMode():
        model: OrderedDict[str, Any] = OrderedDict(
            (name, torch.empty(kind.shape, dtype=kind.dtype)) for name, (kind, _) in tensors.items()
        )
    for name in list(model):
        module = name.removesuffix(".weight")
        if module.endswith(_LINEARS):
            model[f"{module}._extra_state"] = None  # which Transformer Engine asks for
    if any(name.startswith("decoder.final_layernorm") for name in model):
        model["output_layer._extra_state"] = None  # of a tied head, too
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({**rest, "model": model}, path)
    made = load_torch_file(path)["model"]
    with path.open("r+b") as file:
        for name, (kind, value) in tensors.items():
            tensor = value()
            assert tensor.shape == kind.shape and tensor.dtype == kind.dtype
            file.seek(StoredTensor.of(path, made[name]).offset)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            advance(tensor.numel())


def write_megatron_dist(source: Source, dst: Path, *, dtype: str | None = None, console: Console) -> Path:
    """Write Megatron's torch_dist format, which any of its layouts loads; arguments as for `write_megatron`."""
    model = source.config.model
    names = megatron_names(model)
    source.require(list(names))
    rows = _padded_rows(model.vocab_size, 1)
    common = {
        "args": Namespace(**write_arguments(model, 1, 1, rows), use_dist_ckpt=True, dist_ckpt_format="torch_dist"),
        "checkpoint_version": 3.0,
        "iteration": 0,
    }
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    total = sum(math.prod(source.kinds[name].shape) for name in names)
    with new_directory(dst) as folder, progress(console, f"exporting {source.path}", total, "elements") as advance:
        inner = folder / RELEASE
        inner.mkdir()
        chunks = [chunk for name, theirs in names.items() for chunk in _chunks(source, name, theirs, rows, dtype)]
        write_chunks(inner, chunks, advance)
        torch.save(common, inner / COMMON)
        text = json.dumps({**backend, "common_backend": "torch", "common_backend_version": 1})
        (inner / SHARDED).write_text(text)
        (folder / LATEST).write_text(RELEASE)
    return dst


def _chunks(source: Source, name: str, theirs: str, rows: int, dtype: str | None) -> Iterator[Chunk]:
    """Yield a tensor as a layer of the stack of all layers, or by itself, the vocabulary with its padding."""
    kind = source.kinds[name]
    target = written_dtype(kind.dtype, dtype)
    value = partial(source.read, name, dtype=target)
    if name.startswith("layers."):
        n_layers, layer = source.config.model.n_layers, int(name.split(".")[1])
        together = theirs.replace(f".layers.{layer}.", ".layers.", 1)
        offsets, sizes = (layer, *[0] * len(kind.shape)), (1, *kind.shape)
        yield Chunk(together, (n_layers, *kind.shape), target, offsets, sizes, lambda: value().unsqueeze(0))
    elif name in ("embed.weight", "head.weight"):
        v, h = kind.shape
        yield Chunk(theirs, (rows, h), target, (0, 0), (v, h), value)
        if rows > v:
            zeros = partial(torch.zeros, rows - v, h, dtype=target)
            yield Chunk(theirs, (rows, h), target, (v, 0), (rows - v, h), zeros)
    else:
        yield Chunk(theirs, kind.shape, target, (0,) * len(kind.shape), kind.shape, value)
