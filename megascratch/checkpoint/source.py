"""Where a conversion's tensors come from, whatever the format: our names and logical shapes, read a box at a time.

    Source                     read by                  written by
    our checkpoint             source.own               convert.write_own
    Hugging Face folder, DCP   hf.hf_source             hf.write_hf, hf.write_dcp
    Megatron-LM                megatron.open_megatron   megatron.write_megatron

Every writer takes every source, so two formats need no third between them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megascratch.checkpoint.format import DTYPES, OPTIMIZER, damage, whole
from megascratch.checkpoint.load import Reader, tensor_shard
from megascratch.config import Config
from megascratch.dist.layout import Box, lengths
from megascratch.errors import CheckpointError, Problem
from megascratch.nn import DTYPES as TRAIN_DTYPES

Key = TypeVar("Key")
Value = TypeVar("Value")

_LARGEST_SIZE = 1 << 28  # far above any model's, and small enough for products of two
BLOCK_BYTES = 32 << 20  # of a large tensor that is read and written in blocks


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

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a tensor."""
        ...


@dataclass(frozen=True)
class Source:
    """A model's tensors by our names.

    Attributes:
        path: of the checkpoint or folder.
        config: resolved, of the model.
        kinds: of every tensor.
        read_box: returns a box of a tensor in a dtype.
        step: training steps done.
        state: what else a checkpoint of ours says; empty for others.
    """

    path: Path
    config: Config
    kinds: Mapping[str, Kind]
    read_box: Callable[[str, Box, torch.dtype], Tensor]
    step: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)

    def require(self, names: list[str]) -> None:
        """Raise a CheckpointError if a tensor that the model has is not there."""
        missing = [name for name in names if name not in self.kinds]
        if missing:
            raise damage(self.path, f"tensor {missing[0]}", "is not in the checkpoint")

    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return a box of a tensor, or all of it, in a dtype, or its own."""
        kind = self.kinds[name]
        return self.read_box(name, box or whole(kind.shape), dtype or kind.dtype)

    def blocks(self, name: str, box: Box, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a box of a tensor in blocks of rows, so that a vocabulary's rows are never in memory all at once."""
        if not box:
            yield self.read(name, box, dtype)
            return
        row_bytes = math.prod(lengths(box)[1:]) * max(dtype.itemsize, self.kinds[name].dtype.itemsize)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(box[0].start, box[0].stop, step):
            yield self.read(name, (slice(start, min(start + step, box[0].stop)), *box[1:]), dtype)

    @property
    def weights(self) -> dict[str, Kind]:
        """The tensors but those of an optimizer."""
        return {name: kind for name, kind in self.kinds.items() if not name.startswith(OPTIMIZER)}


class Latest(Generic[Key, Value]):
    """A function that keeps its last result, for who asks again, and lets go of it before it makes the next."""

    def __init__(self, make: Callable[[Key], Value]) -> None:
        self._make = make
        self._kept: tuple[Key, Value] | None = None

    def __call__(self, key: Key) -> Value:
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = key, self._make(key)
        return self._kept[1]


def own(path: Path) -> Source:
    """Open a checkpoint of ours; each read is verified.

    Args:
        path: the checkpoint itself (`find`).
    """
    reader = Reader(path)
    tensors = reader.manifest.tensors

    def read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
        shard = tensor_shard(name, tensors[name], box, dtype)
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


def check_sizes(section: Mapping[str, Any]) -> None:
    """Raise a CheckpointError for a number that no model has, before tensors of such a size are thought of."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            check_sizes(value)
        elif isinstance(value, int) and abs(value) > _LARGEST_SIZE:
            rule = f"must not exceed {_LARGEST_SIZE}"
            raise CheckpointError(Problem(f"{key} = {value}"[:100], rule, "correct the file that says so"))
