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

from megascratch.checkpoint.megatron import (
    COMMON,
    LATEST,
    SHARDED,
    all_experts,
    expert_names,
    matrix,
    megatron_names,
    of_one_expert,
)
from megascratch.checkpoint.megatron_args import write_arguments
from megascratch.checkpoint.pickles import StoredTensor, load_torch_file
from megascratch.checkpoint.pieces import new_directory
from megascratch.checkpoint.source import Kind, Source, written_dtype
from megascratch.config import ModelConfig
from megascratch.dist.distributed_checkpoint import Chunk, write_chunks
from megascratch.dist.layout import Box, ParamSpec, Split, extents, lengths
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import layer_range, parameter_specs

RELEASE = "release"  # what Megatron calls weights without a run
_ROWS = 128  # that it pads each rank's part of the vocabulary to a multiple of
_LINEARS = (".linear_qkv", ".linear_proj", ".linear_fc1", ".linear_fc2")
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
            held = _held(names, model, stage, pp)
            for rank in range(tp):
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                (folder / RELEASE / name).mkdir(parents=True)
                tensors = {
                    theirs: _local(source, specs[ours], expert, tp, rank, dtype)
                    for theirs, (ours, expert) in held.items()
                }
                rest = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}
                _write_rank(folder / RELEASE / name / "model_optim_rng.pt", rest, tensors, advance)
        (folder / LATEST).write_text(RELEASE)
    return dst


def _held(names: Mapping[str, str], model: ModelConfig, stage: int, pp: int) -> dict[str, tuple[str, int | None]]:
    """Return what a stage holds, by Megatron's names for it, whose layers are numbered from 0.

    Returns: our name, and which expert of it, if it is of experts.
    """
    layers = layer_range(model.n_layers, stage, pp)
    held: dict[str, tuple[str, int | None]] = {}
    for ours, theirs in names.items():
        head, _, rest = ours.partition(".")
        if head == "layers":
            layer = int(rest.partition(".")[0])
            if layer in layers:
                theirs = theirs.replace(f".layers.{layer}.", f".layers.{layer - layers.start}.", 1)
                singly, _ = expert_names(theirs, model.moe.num_experts if model.moe is not None else 0)
                held |= {name: (ours, expert) for expert, name in enumerate(singly)}
                if not singly:
                    held[theirs] = ours, None
        elif stage == (pp - 1 if head in ("norm", "head") else 0):
            held[theirs] = ours, None
    if model.tie_embeddings and pp > 1 and stage == pp - 1:
        held["output_layer.weight"] = "embed.weight", None
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


def _local(
    source: Source, spec: ParamSpec, expert: int | None, tp: int, rank: int, dtype: str | None
) -> tuple[Kind, Value]:
    """Return what a rank holds of a tensor, or of one expert's part of it: its kind, and what makes it."""
    target = written_dtype(source.kinds[spec.name].dtype, dtype)
    of_all: Box = () if expert is None else (slice(expert, expert + 1),)
    part = spec if expert is None else of_one_expert(spec)
    shape = part.local_shape({"tp": tp})

    def value() -> Tensor:
        if shape == spec.shape:
            return source.read(spec.name, dtype=target)
        local = torch.zeros(shape, dtype=target)
        for extent in extents(part, {"tp": tp}, {"tp": rank}):
            values = source.read(spec.name, (*of_all, *extent.logical), target)
            local[extent.local] = values.view(lengths(extent.logical))
        return local.view(matrix(shape))

    return Kind(target, matrix(shape)), value


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
        specs = {spec.name: spec for spec in parameter_specs(model)}
        chunks = [
            chunk for name, theirs in names.items() for chunk in _chunks(source, specs[name], theirs, rows, dtype)
        ]
        write_chunks(inner, chunks, advance)
        torch.save(common, inner / COMMON)
        text = json.dumps({**backend, "common_backend": "torch", "common_backend_version": 1})
        (inner / SHARDED).write_text(text)
        (folder / LATEST).write_text(RELEASE)
    return dst


def _chunks(source: Source, spec: ParamSpec, theirs: str, rows: int, dtype: str | None) -> Iterator[Chunk]:
    """Yield a tensor as a layer of the stack of all layers, or by itself, the vocabulary with its padding.

    Where some layers have experts and some not, Megatron stacks none.
    """
    name, kind, model = spec.name, source.kinds[spec.name], source.config.model
    target = written_dtype(kind.dtype, dtype)
    value = partial(source.read, name, dtype=target)
    alike = len({model.has_experts(layer) for layer in range(model.n_layers)}) == 1
    if name.startswith("layers."):
        layer = int(name.split(".")[1])
        shape = all_experts(spec) if ".experts." in name else kind.shape
        together = theirs.replace(f".layers.{layer}.", ".layers.", 1)
        if alike:
            offsets, sizes = (layer, *[0] * len(shape)), (1, *shape)
            yield Chunk(together, (model.n_layers, *shape), target, offsets, sizes, lambda: value().view(sizes))
        else:
            yield Chunk(theirs, shape, target, (0,) * len(shape), shape, lambda: value().view(shape))
    elif name in ("embed.weight", "head.weight"):
        v, h = kind.shape
        yield Chunk(theirs, (rows, h), target, (0, 0), (v, h), value)
        if rows > v:
            zeros = partial(torch.zeros, rows - v, h, dtype=target)
            yield Chunk(theirs, (rows, h), target, (v, 0), (rows - v, h), zeros)
    else:
        yield Chunk(theirs, kind.shape, target, (0,) * len(kind.shape), kind.shape, value)
