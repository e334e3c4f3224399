"""Exchange with Hugging Face's format, both ways, one of our tensors in memory at a time.

    model-00001-of-00002.safetensors …    tensors by the family's names; one file is called model.safetensors
    model.safetensors.index.json          which file holds which tensor, where there are several
    config.json  generation_config.json   shape, and what `generate` starts from
    tokenizer.json  tokenizer_config.json

The families are tables in `families.py`.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megascratch.checkpoint.families import Family, family_for
from megascratch.checkpoint.format import damage, whole
from megascratch.checkpoint.hf_config import read_config, write_config
from megascratch.checkpoint.hf_folder import CONFIG, INDEX, SINGLE, read_json
from megascratch.checkpoint.pieces import NewPiece, new_directory, write_pieces
from megascratch.checkpoint.source import Container, Kind, Latest, Source, written_dtype
from megascratch.checkpoint.steps import Step
from megascratch.config import DataConfig, ModelConfig, config_from_dict
from megascratch.dist.distributed_checkpoint import Chunk, write_chunks
from megascratch.dist.layout import Box
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import parameter_specs
from megascratch.tokenizer import Tokenizer

LARGEST_FILE_BYTES = 5_000_000_000  # what the Hub splits at
GENERATION = "generation_config.json"
# What goes along with a model, both ways.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)
_LARGEST_COMPANION_BYTES = 256 << 20
_TRAIN_DTYPE_OF = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def write_hf(
    source: Source,
    dst: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    console: Console,
) -> Path:
    """Write weights as a folder that `AutoModelForCausalLM.from_pretrained` opens.

    Args:
        source: of the weights.
        dst: folder to make; must not exist.
        family: as which it is written, where several express the model; the first of them when left out.
        dtype: of the weights; unchanged when left out.
        tokenizer: the model's `tokenizer.json`, or its directory, and its end-of-document id becomes the end of
            generation; when left out, the tokenizer's files beside the source go along as they are.
        console: for progress.

    Returns: `dst`.

    Raises: CheckpointError: if the source is damaged, `dst` exists, or no family has models of this shape.
    """
    chosen, opened = _chosen(source, family, tokenizer)
    files = _files(list(exported(source, chosen, dtype)))
    total = sum(math.prod(piece.shape) for pieces in files for piece in pieces)
    with new_directory(dst) as folder, progress(console, f"exporting {source.path}", total, "elements") as advance:
        weight_map: dict[str, str] = {}
        for index, pieces in enumerate(files, start=1):
            name = SINGLE if len(files) == 1 else f"model-{index:05d}-of-{len(files):05d}.safetensors"
            write_pieces(folder / name, pieces, advance)
            weight_map |= {piece.name: name for piece in pieces}
        if len(files) > 1:
            size = sum(_bytes(piece) for pieces in files for piece in pieces)
            _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_beside(folder, source, chosen, opened, files[0][0].dtype)
    return dst


def write_dcp(
    source: Source,
    dst: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    console: Console,
) -> Path:
    """Write weights as a distributed checkpoint of torch, by the names that transformers' model has for them.

    `config.json` and the tokenizer stand beside it. Arguments and errors as for `write_hf`.
    """
    chosen, opened = _chosen(source, family, tokenizer)
    pieces = list(exported(source, chosen, dtype))
    total = sum(math.prod(piece.shape) for piece in pieces)
    chunks = [
        Chunk(piece.name, piece.shape, piece.dtype, (0,) * len(piece.shape), piece.shape, piece.value)
        for piece in pieces
    ]
    with new_directory(dst) as folder, progress(console, f"exporting {source.path}", total, "elements") as advance:
        write_chunks(folder, chunks, advance)
        _write_beside(folder, source, chosen, opened, pieces[0].dtype)
    return dst


def _chosen(source: Source, family: str | None, tokenizer: Path | None) -> tuple[Family, Tokenizer | None]:
    """Return the family that is written and the tokenizer that was given, checked against the model."""
    model = source.config.model
    opened = Tokenizer.from_file(tokenizer) if tokenizer is not None else None
    if opened is not None and model.vocab_size is not None and opened.vocab_size > model.vocab_size:
        rule = f"has {opened.vocab_size} ids, the model has {model.vocab_size}"
        raise CheckpointError(Problem(str(tokenizer), rule, "give the tokenizer that it was trained with"))
    return family_for(model, family), opened


def _write_beside(
    folder: Path, source: Source, family: Family, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> None:
    """Write what goes along with the weights: the tokenizer, `generation_config.json` and `config.json`."""
    if tokenizer is not None:
        tokenizer.save(folder)
        _write_json(folder / GENERATION, {"_from_model_config": True, "eos_token_id": tokenizer.eod_id})
    else:
        copy_companions(source.path, folder)
    if not (folder / GENERATION).exists():
        _write_json(folder / GENERATION, {"_from_model_config": True, "eos_token_id": None})
    eos_id = read_json(folder, GENERATION).get("eos_token_id")
    config = write_config(source.config.model, family, str(dtype).removeprefix("torch."), eos_id)
    _write_json(folder / CONFIG, config)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that go along with a model's weights, such as its tokenizer's."""
    for name in COMPANIONS:
        file = source / name
        if file.is_file() and file.stat().st_size <= _LARGEST_COMPANION_BYTES:
            shutil.copyfile(file, target / name)


def hf_source(container: Container, config: Mapping[str, Any]) -> Source:
    """Return the model that tensors by a family's names are.

    Args:
        container: of the tensors.
        config: `config.json`.

    Raises: CheckpointError: if a tensor is missing, left over or of another shape, or our model cannot be of that kind.
    """
    path = container.path
    try:
        family, section = read_config(config, len(container.kinds))
    except CheckpointError as error:
        raise CheckpointError(error.problems, str(path / CONFIG)) from None
    dtypes = {kind.dtype for kind in container.kinds.values() if kind.dtype in _TRAIN_DTYPE_OF}
    raw = {
        "model": section,
        "data": {"seq_length": min(section["max_seq_length"], DataConfig().seq_length)},
        "train": {"dtype": _TRAIN_DTYPE_OF[max(dtypes, key=lambda d: d.itemsize, default=torch.float32)]},
    }
    resolved = config_from_dict(raw, where=str(path / CONFIG))
    model = resolved.model
    steps = {step.ours: step for step in steps_of(family.steps, model)}
    names = _Names.of(container, family)
    names.check_all_used(steps.values(), family, container)
    specs = {spec.name: spec.shape for spec in parameter_specs(model)}
    kinds = {name: names.kind_of(step, specs[name], model, container) for name, step in steps.items()}

    @Latest  # the pieces of one tensor are asked for one after the other
    def joined(name: str) -> Tensor:
        theirs = [names.theirs(their) for their in steps[name].theirs]
        return steps[name].join([container.read(their, whole(container.kinds[their].shape)) for their in theirs], model)

    def read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
        step = steps[name]
        values = container.read(names.theirs(step.theirs[0]), box) if step.same else joined(name)[box]
        return values.to(dtype)

    return Source(path, resolved, kinds, read)


@dataclass(frozen=True)
class _Names:
    """What tensors are called in a container: a family's names, perhaps within another name, or without their head.

    Attributes:
        outer: what all of the model's names begin with besides (`model.` of a training state).
        dropped: what the family's names begin with that is left out.
    """

    outer: str
    dropped: str

    @classmethod
    def of(cls, container: Container, family: Family) -> "_Names":
        """Find both from where the embedding stands."""
        embedding = next(step.theirs[0] for step in family.steps if step.ours == "embed.weight")
        bare = embedding.removeprefix(family.prefix)
        found = sorted((name for name in container.kinds if name.endswith(bare)), key=len)
        before = found[0].removesuffix(bare) if found else family.prefix
        if before.endswith(family.prefix):
            return cls(before.removesuffix(family.prefix), "")
        return cls(before, family.prefix)

    def theirs(self, name: str) -> str:
        return self.outer + name.removeprefix(self.dropped)

    def check_all_used(self, steps: Any, family: Family, container: Container) -> None:
        """Raise a CheckpointError with tensors that are missing or have no place in the model."""
        used = {self.theirs(their) for step in steps for their in step.theirs}
        problems = [Problem(f"tensor {name}", "is not in the folder") for name in sorted(used - container.kinds.keys())]
        # Old folders hold rotary tables, and some a copy of a tied head; neither says anything new.
        ignored = re.compile(f"{re.escape(self.outer)}({family.ignored}|lm_head\\.weight)")
        inside = {name for name in container.kinds if name.startswith(self.outer) and not ignored.fullmatch(name)}
        problems += [
            Problem(f"tensor {name}", "has no place in this kind of model", "convert another model")
            for name in sorted(inside - used)
        ]
        if problems:
            raise CheckpointError(problems[:10], str(container.path))

    def kind_of(self, step: Step, shape: tuple[int, ...], model: ModelConfig, container: Container) -> Kind:
        """Return our tensor's kind, after checking that theirs are what its parts are.

        Raises: CheckpointError: if one is of another shape or dtype.
        """
        found = [container.kinds[self.theirs(their)] for their in step.theirs]
        dtype = found[0].dtype
        if dtype not in _TRAIN_DTYPE_OF:
            rule = f"is {dtype}, a quantised or integer weight"
            raise damage(container.path, f"tensor {step.theirs[0]}", rule, "convert the unquantised model")
        for their, kind, expected in zip(step.theirs, found, _shapes(step.split(_meta(shape), model))):
            if kind != Kind(dtype, expected):
                rule = f"is {kind.dtype} {list(kind.shape)}, config.json asks for {dtype} {list(expected)}"
                raise CheckpointError(Problem(f"tensor {their}", rule, "check config.json"), str(container.path))
        return Kind(dtype, shape)


def steps_of(table: Sequence[Step], model: ModelConfig) -> list[Step]:
    """Return a family's steps for the tensors that a model has, in the model's order."""
    n_experts = model.moe.num_experts if model.moe is not None else 0
    layers = (step.at(layer, n_experts) for layer in range(model.n_layers) for step in table)
    by_name = {step.ours: step for step in layers}
    # Modules that look ahead serve training, and have no place in transformers' models.
    names = [spec.name for spec in parameter_specs(model) if not spec.tied and not spec.name.startswith("mtp.")]
    unnamed = [name for name in names if name not in by_name]
    assert not unnamed, f"the family has no name for {unnamed[0]}"
    return [by_name[name] for name in names]


def exported(source: Source, family: Family, dtype: str | None) -> Iterator[NewPiece]:
    """Yield their tensors in order; parts of one fused tensor share a single read.

    Raises: CheckpointError: if the source lacks a tensor of the model.
    """
    model = source.config.model
    steps = steps_of(family.steps, model)
    source.require([step.ours for step in steps])

    @Latest
    def parts(step: Step) -> Sequence[Tensor]:
        return step.split(source.read(step.ours), model)

    def part(step: Step, index: int, target: torch.dtype) -> Tensor:
        return parts(step)[index].to(target)

    for step in steps:
        kind = source.kinds[step.ours]
        target = written_dtype(kind.dtype, dtype)
        for index, shape in enumerate(_shapes(step.split(_meta(kind.shape), model))):
            value = partial(part, step, index, target)
            blocks = partial(source.blocks, step.ours, whole(shape), target) if step.same else None
            yield NewPiece(step.theirs[index], shape, target, whole(shape), value, blocks)


def _files(pieces: Sequence[NewPiece]) -> list[list[NewPiece]]:
    """Group tensors into files of at most `LARGEST_FILE_BYTES`, or of one larger tensor."""
    files: list[list[NewPiece]] = [[]]
    size = 0
    for piece in pieces:
        if files[-1] and size + _bytes(piece) > LARGEST_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += _bytes(piece)
    return files


def _bytes(piece: NewPiece) -> int:
    return math.prod(piece.shape) * piece.dtype.itemsize


def _meta(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
