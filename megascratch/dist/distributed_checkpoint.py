"""Writing torch's distributed checkpoints (DCP) from one process, a chunk of a tensor in memory at a time.

    __0_0.distcp   every chunk as `torch.save` has it, one behind the other
    .metadata      a pickle: which chunks tile which tensor, and where each stands

torch's own planner wants a state dict of tensors that exist. This one plans from shapes, and makes each chunk when its
turn to be written comes.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor that is to be written.

    Attributes:
        name, shape, dtype: of the tensor.
        offsets, sizes: of the box.
        value: makes it, [*sizes].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    value: Callable[[], Tensor]


def write_chunks(folder: Path, chunks: Sequence[Chunk], advance: Callable[[float], None]) -> None:
    """Write a distributed checkpoint.

    Args:
        folder: exists, and is empty of one.
        chunks: that tile their tensors.
        advance: is told the number of elements of each chunk that was written.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        save({}, storage_writer=writer, planner=_Planner(chunks, advance), no_dist=True)


class _Planner(DefaultSavePlanner):
    """Plans chunks that do not exist yet."""

    def __init__(self, chunks: Sequence[Chunk], advance: Callable[[float], None]) -> None:
        super().__init__(flatten_state_dict=False)
        self._chunks = {(chunk.name, chunk.offsets): chunk for chunk in chunks}
        self._advance = advance
        self._last = torch.empty(0)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(chunk) for chunk in self._chunks.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        chunk = self._chunks[index.fqn, tuple(index.offset or ())]
        self._advance(torch.Size(chunk.sizes).numel())
        # The writer keeps every tensor until the end. It is through with one when it asks for the next: its memory is
        # taken back, and it is a copy, which nobody else looks at.
        self._last.untyped_storage().resize_(0)
        self._last = chunk.value().clone(memory_format=torch.contiguous_format)
        return self._last


def _item(chunk: Chunk) -> WriteItem:
    box = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
    data = TensorWriteData(box, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(MetadataIndex(chunk.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
