"""Reading torch's distributed checkpoints (DCP) with no process group and no pickle that could run.

    .metadata        which chunks tile which tensor, and in which file at which offset each stands
    __0_0.distcp …   the chunks, each as torch.save has it

By hand, [4, 6] saved by two ranks that hold three columns each: chunks at (0, 0) and (0, 3) of sizes (4, 3). Reading
the tensor copies both where they belong.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megascratch.checkpoint.format import LARGEST_NUMEL, check_tiling, damage
from megascratch.checkpoint.pickles import Inert, check_archive, constant, read_metadata
from megascratch.checkpoint.source import Kind
from megascratch.dist.layout import Box, intersect, lengths, shift

METADATA = ".metadata"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class _Stored:
    """A box of a tensor, and where its bytes stand."""

    box: Box
    file: str
    offset: int
    length: int


class DcpFolder:
    """A distributed checkpoint, opened for reading.

    Args:
        path: of the folder.

    Attributes:
        path: of the folder.
        kinds: of every tensor.

    Raises: CheckpointError: if it is damaged, or its chunks do not tile their tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: Mapping[str, Kind]
        self.kinds, self._chunks = self._read_table()
        self._last: tuple[_Stored | None, Tensor] = None, torch.empty(0)

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a tensor, from the chunks that it meets.

        Raises: CheckpointError: if a file is missing or damaged.
        """
        kind = self.kinds[name]
        out = torch.empty(lengths(box), dtype=kind.dtype)
        origin = tuple(slice(0, n) for n in out.shape)
        for stored in self._chunks[name]:
            common = intersect(stored.box, box)
            if common is None:
                continue
            if stored is not self._last[0]:  # a chunk is often asked for in blocks
                self._last = None, torch.empty(0)
                self._last = stored, self._read_chunk(name, stored, kind.dtype)
            chunk = self._last[1]
            inside = shift(common, stored.box, tuple(slice(0, n) for n in chunk.shape))
            out[shift(common, box, origin)] = chunk[inside]
        return out

    def _read_table(self) -> tuple[dict[str, Kind], dict[str, list[_Stored]]]:
        metadata = read_metadata(self.path / METADATA)
        tensors, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
        if not isinstance(tensors, dict) or not isinstance(storage, dict):
            raise damage(self.path, METADATA, "is no metadata of a checkpoint")
        places: dict[tuple[str, Any], Inert] = {}
        for index, info in storage.items():
            if isinstance(index, Inert) and isinstance(info, Inert):
                places[str(index.get("fqn")), index.get("offset")] = info
        total = sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        kinds: dict[str, Kind] = {}
        chunks: dict[str, list[_Stored]] = {}
        for name, entry in tensors.items():
            if isinstance(entry, Inert) and "chunks" in (entry.state if isinstance(entry.state, dict) else {}):
                kinds[str(name)] = kind = self._kind(str(name), entry)
                if math.prod(kind.shape) * kind.dtype.itemsize > total:  # before memory is taken for it
                    raise damage(self.path, f"{METADATA}: tensor {name[:80]}", "is larger than all files together")
                chunks[str(name)] = [self._stored(str(name), c, kind, places) for c in entry.get("chunks")]
                check_tiling(str(name), kind.shape, [stored.box for stored in chunks[str(name)]], self.path)
        return kinds, chunks

    def _kind(self, name: str, entry: Inert) -> Kind:
        shape, properties = entry.get("size"), entry.get("properties")
        state = properties.state if isinstance(properties, Inert) else None
        found = state[0] if isinstance(state, tuple) and state else properties.get("dtype") if properties else None
        dtype = constant(found)
        whole = isinstance(shape, tuple) and len(shape) <= 8 and all(isinstance(n, int) and n > 0 for n in shape)
        if not whole or math.prod(shape) > LARGEST_NUMEL or not isinstance(dtype, torch.dtype):
            raise damage(self.path, f"{METADATA}: tensor {name[:80]}", "has an impossible shape or dtype")
        return Kind(dtype, tuple(shape))

    def _stored(self, name: str, chunk: Any, kind: Kind, places: Mapping[tuple[str, Any], Inert]) -> _Stored:
        here = f"{METADATA}: tensor {name[:80]}"
        found = [chunk.get(key) if isinstance(chunk, Inert) else None for key in ("offsets", "sizes")]
        fits = [v for v in found if isinstance(v, tuple) and len(v) == len(kind.shape)]
        numbers = len(fits) == 2 and all(isinstance(n, int) for values in fits for n in values)
        box = tuple(slice(a, a + n) for a, n in zip(*fits)) if numbers else ()
        if not numbers or not all(0 <= s.start < s.stop <= n for s, n in zip(box, kind.shape)):
            raise damage(self.path, here, "has a chunk of impossible place or size")
        offsets, sizes = fits
        info = places.get((name, offsets)) or places.get((name, None))
        file, offset, length = (info.get(k) if info else None for k in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise damage(self.path, here, "must stand in a file of the folder itself", "don't use it")
        if info is not None and info.get("transform_descriptors"):
            raise damage(self.path, here, "is compressed", "save it without extensions")
        path = self.path / file
        size = path.stat().st_size if path.is_file() and not path.is_symlink() else -1
        n_bytes = math.prod(sizes) * kind.dtype.itemsize
        if not isinstance(offset, int) or not isinstance(length, int) or not 0 <= offset <= offset + length <= size:
            raise damage(self.path, here, f"claims bytes that {file} has not")
        if n_bytes > length:
            raise damage(self.path, here, f"has {n_bytes} bytes, more than the {length} that are stored")
        return _Stored(box, file, offset, length)

    def _read_chunk(self, name: str, stored: _Stored, dtype: torch.dtype) -> Tensor:
        with (self.path / stored.file).open("rb") as file:
            check_archive(_Part(file, stored), stored.length, self.path, stored.file)
            try:
                tensor = torch.load(_Part(file, stored), map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises whatever comes
                rule = f"of tensor {name} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
                span = f"{stored.file}, bytes {stored.offset}..{stored.offset + stored.length}"
                raise damage(self.path, span, rule[:300]) from None
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != lengths(stored.box):
            raise damage(self.path, stored.file, f"does not hold tensor {name} as {METADATA} says")
        return tensor


class _Part(io.RawIOBase, BinaryIO):
    """A run of a file as a file of its own."""

    def __init__(self, file: BinaryIO, stored: _Stored) -> None:
        self._file, self._start, self._length, self._at = file, stored.offset, stored.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return int(count)
