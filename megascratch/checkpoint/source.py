"""Where a conversion's tensors come from, whatever the format: our names and logical shapes, read a box at a time.

    Source                     read by                  written by
    our checkpoint             source.own               convert.write_own
    Hugging Face folder, DCP   hf.hf_source             hf.write_hf, hf.write_dcp
    Megatron-LM                megatron.open_megatron   megatron.write_megatron

Every writer takes every source, so two formats need no third between them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megascratch.checkpoint.format import DTYPES, OPTIMIZER, damage
from megascratch.checkpoint.load import Reader, tensor_shard
from megascratch.config import Config
from megascratch.dist.layout import Box
from megascratch.errors import CheckpointError, Problem
from megascratch.nn import DTYPES as TRAIN_DTYPES


@dataclass(frozen=True)
class Kind:
    """Dtype and logical shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Container(Protocol):
    """Files that hold tensors by the names of another format."""

    @property
    def path(self) -> Path: ...

    @property
    def kinds(self) -> Mapping[str, Kind]: ...

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        ...


@dataclass(frozen=True)
class Source:
    """A model's tensors by our names.

    Attributes:
        path: of the checkpoint or folder.
        config: resolved, of the model.
        kinds: of every tensor.
        read: returns a box of a tensor, in its own dtype.
        step: training steps done.
        state: what else a checkpoint of ours says; empty for others.
    """

    path: Path
    config: Config
    kinds: Mapping[str, Kind]
    read: Callable[[str, Box], Tensor]
    step: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)

    def require(self, names: list[str]) -> None:
        """Raise a CheckpointError if a tensor that the model has is not there."""
        missing = [name for name in names if name not in self.kinds]
        if missing:
            raise damage(self.path, f"tensor {missing[0]}", "is not in the checkpoint")

    def read_as(self, name: str, box: Box, dtype: torch.dtype) -> Tensor:
        return self.read(name, box).to(dtype)

    @property
    def weights(self) -> dict[str, Kind]:
        """The tensors but those of an optimizer."""
        return {name: kind for name, kind in self.kinds.items() if not name.startswith(OPTIMIZER)}


def own(path: Path) -> Source:
    """Open a checkpoint of ours; each read is verified.

    Args:
        path: the checkpoint itself (`find`).
    """
    reader = Reader(path)
    tensors = reader.manifest.tensors

    def read(name: str, box: Box) -> Tensor:
        shard = tensor_shard(name, tensors[name], box, DTYPES[tensors[name].dtype])
        reader.fill([shard])
        return shard.tensor

    kinds = {name: Kind(DTYPES[record.dtype], record.shape) for name, record in tensors.items()}
    return Source(path, reader.config(), kinds, read, reader.manifest.step, reader.state())


def written_dtype(saved: torch.dtype, dtype: str | None) -> torch.dtype:
    """Return what a tensor is written as: in the dtype that was asked for, if it is a number with a point.

    Raises: CheckpointError: if there is no such dtype.
    """
    if dtype is None or not saved.is_floating_point:
        return saved
    if dtype not in TRAIN_DTYPES:
        raise CheckpointError(Problem(f"dtype = {dtype}", "is not a dtype", f"use {', '.join(TRAIN_DTYPES)}"))
    return TRAIN_DTYPES[dtype]
