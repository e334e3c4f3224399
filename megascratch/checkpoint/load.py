"""Loading: a rank reads the pieces that intersect what it wants, whatever the layout that saved them.

By hand: a piece holds rows 0:4 of a tensor [8, 3], 12 elements in chunks of 4. A rank wants rows 2:6. The common box is
rows 2:4, elements 6 to 11 of the piece, so chunks 1 and 2 are read and verified, and chunk 0 is not touched:

    chunk 0   elements 0..3    rows [0, 0:3], [1, 0:1]                 nothing wanted
    chunk 1   elements 4..7    rows [1, 1:3], [2, 0:2]                 [2, 0:2] is copied
    chunk 2   elements 8..11   rows [2, 2:3], [3, 0:3]                 both are copied

`run_boxes` gives the boxes of a chunk, `intersect` what is wanted of them: the arithmetic that laid the tensors out
also brings them back. One chunk of memory is needed besides the tensors that are filled.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascratch.checkpoint.format import (
    DTYPES,
    LARGEST_STATE_BYTES,
    LATEST,
    MANIFEST,
    STATE,
    Manifest,
    Piece,
    Shard,
    TensorRecord,
    damage,
    digest,
    open_regular,
    read_bounded,
    whole,
)
from megascratch.checkpoint.places import SourceFile
from megascratch.checkpoint.retention import STEP_NAME
from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import Box, Extent, intersect, lengths, run_boxes, shift
from megascratch.errors import CheckpointError, Problem

_LARGEST_LATEST_BYTES = 4096
_SHOWN_PROBLEMS = 10


def load(path: Path, shards: Sequence[Shard], *, cast: bool = False) -> None:
    """Fill every shard's tensor in place.

    Args:
        path: a checkpoint, or a directory with `latest`.
        shards: what this rank wants; elements that no extent covers (padding) are left as they are.
        cast: whether floating-point tensors may be converted to the shards' dtype; otherwise dtypes must be equal, but
            for shards that say so themselves.

    Raises: CheckpointError: naming file, tensor and bytes. Tensors that do not fit are all found before anything is
        read; after damage in a piece, the contents of the shards are undefined.
    """
    reader = Reader(find(path))
    saved = reader.manifest.tensors
    there = [shard for shard in shards if not shard.optional or shard.name in saved]
    wanted = [s if s.stand_in is None or s.name in saved else replace(s, name=s.stand_in) for s in there]
    reader.check_fit(wanted, cast=cast)
    reader.fill(wanted)


def read_state(path: Path) -> dict[str, Any]:
    """Read `state.json`: step, consumed samples, random state, resolved configuration.

    Raises: CheckpointError: if it is missing or damaged.
    """
    directory = find(path)
    return _read_state(directory, Manifest.read(directory))


def _read_state(directory: Path, manifest: Manifest) -> dict[str, Any]:
    data = read_bounded(directory / STATE, LARGEST_STATE_BYTES)
    if digest(data) != manifest.state.xxh3:
        raise damage(directory, STATE, "does not match its checksum: it is damaged")
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        raise damage(directory, STATE, "is not JSON") from None
    if not isinstance(state, dict):
        raise damage(directory, STATE, "must hold a table")
    return state


def find(path: Path) -> Path:
    """Return the directory of a checkpoint: `path` itself, or the one that its `latest` names.

    Raises: CheckpointError: if there is none.
    """
    if path.name.endswith(".tmp"):
        raise damage(path, path.name, "is a checkpoint that was not finished", "give an earlier one, without .tmp")
    if (path / MANIFEST).is_file():
        return path
    if not path.exists():
        raise damage(path, path.name, "does not exist", "give a checkpoint, or a directory of checkpoints")
    if not (path / LATEST).is_file():
        rule = f"is no checkpoint: it holds neither {MANIFEST} nor {LATEST}"
        steps = sorted(found.parent.name for found in path.glob(f"step_*/{MANIFEST}"))
        remedy = f"give {path / steps[-1]}" if steps else "give a checkpoint, or a directory of checkpoints"
        raise damage(path, path.name, rule, remedy)
    name = read_bounded(path / LATEST, _LARGEST_LATEST_BYTES).decode(errors="replace").strip()
    if not STEP_NAME.fullmatch(name):
        raise damage(path, f"{LATEST} = {name[:40]!r}", "must name a checkpoint: step_ and a number of 8 digits")
    for candidate in (path / name, path / f"{name}.old"):  # .old: a save of the same step was killed while swapping
        if (candidate / MANIFEST).is_file():
            return candidate
    raise damage(path, f"{LATEST} = {name}", "names a checkpoint that is not there", "give another checkpoint's path")


@dataclass(frozen=True)
class _Want:
    """A box of a logical tensor, and the storage that it goes to: a view of the box's shape."""

    box: Box
    storage: Tensor


@dataclass(frozen=True)
class _Read:
    """A piece, and all that is wanted of it."""

    name: str
    piece: Piece
    wants: list[_Want]


@dataclass(frozen=True)
class _Copy:
    """What a chunk has for a wanted box.

    Attributes:
        offset: where `logical`, a box of consecutive elements, begins in the chunk.
        logical: a box of the chunk.
        common: the part of it that is wanted.
        want: by whom.
    """

    offset: int
    logical: Box
    common: Box
    want: _Want

    def first_in_want(self) -> int:
        """Return which element of the wanted box, row by row, is the first."""
        return self._element([s.start for s in self.common])

    def last_in_want(self) -> int:
        """Return which element of the wanted box is the one behind the last."""
        return self._element([s.stop - 1 for s in self.common]) + 1

    def _element(self, index: Sequence[int]) -> int:
        element = 0
        for i, side in zip(index, self.want.box):
            element = element * (side.stop - side.start) + i - side.start
        return element


class Reader:
    """A checkpoint opened for reading, a verified chunk at a time.

    Args:
        directory: of the checkpoint itself (`find`).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = Manifest.read(directory)
        self._verified: set[str] = set()  # files whose length and header were found right
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def state(self) -> dict[str, Any]:
        return _read_state(self.directory, self.manifest)

    def config(self) -> Config:
        """Return the resolved configuration that the checkpoint was saved with.

        Raises: CheckpointError: if it has none; ConfigError: if it is not valid.
        """
        raw = self.state().get("config")
        if not isinstance(raw, dict):
            raise damage(self.directory, "config", "is not in state.json, so the model's shape is not known")
        config = config_from_dict(raw, where=f"the configuration of {self.directory}")
        if config.model.n_layers > len(self.manifest.tensors):  # before anything loops over them
            rule = f"is more than a checkpoint of {len(self.manifest.tensors)} tensors can have"
            raise damage(self.directory, f"model.n_layers = {config.model.n_layers}", rule)
        return config

    def check_fit(self, shards: Sequence[Shard], *, cast: bool) -> None:
        """Raise one CheckpointError with all shards that the checkpoint cannot fill."""
        problems = []
        for shard in shards:
            record = self.manifest.tensors.get(shard.name)
            if record is None:
                problems.append(Problem(f"tensor {shard.name}", "is not in the checkpoint", "load a fitting one"))
            elif record.shape != tuple(shard.shape):
                rule = f"has shape {list(record.shape)} in the checkpoint, the model has {list(shard.shape)}"
                problems.append(Problem(f"tensor {shard.name}", rule, "use the model section that it was saved with"))
            elif not _convertible(DTYPES[record.dtype], shard.tensor.dtype, cast or shard.casts):
                rule = f"is {record.dtype} in the checkpoint, {shard.tensor.dtype} was asked for"
                problems.append(Problem(f"tensor {shard.name}", rule, "convert the checkpoint, or ask for its dtype"))
        if problems:
            more = len(problems) - _SHOWN_PROBLEMS
            rest = [Problem(f"{more} more tensors", "do not fit either")] if more > 0 else []
            raise CheckpointError(problems[:_SHOWN_PROBLEMS] + rest, str(self.directory))

    def fill(self, shards: Sequence[Shard]) -> None:
        """Fill shards that fit; a piece's bytes are converted where dtypes differ."""
        by_file: dict[str, list[_Read]] = {}
        for shard in shards:
            wants = [_Want(extent.logical, shard.part(extent)) for extent in shard.extents]
            for piece in self.manifest.tensors[shard.name].pieces:
                wanted = [want for want in wants if intersect(want.box, piece.slices) is not None]
                if wanted:
                    by_file.setdefault(piece.file, []).append(_Read(shard.name, piece, wanted))
        for name in sorted(by_file):
            with self.open(name) as file:
                for read in sorted(by_file[name], key=lambda read: read.piece.offset):
                    self._fill_from(file, read)

    def _fill_from(self, file: SourceFile, read: _Read) -> None:
        dtype = DTYPES[self.manifest.tensors[read.name].dtype]
        shape, origin = lengths(read.piece.slices), whole(lengths(read.piece.slices))
        numel, step = math.prod(shape), self.manifest.chunk_bytes // dtype.itemsize
        for index in range(len(read.piece.xxh3)):
            first, last = index * step, min((index + 1) * step, numel)
            copies = []
            for offset, box in run_boxes(shape, first, last):
                logical = shift(box, origin, read.piece.slices)
                for want in read.wants:
                    if (common := intersect(logical, want.box)) is not None:
                        copies.append(_Copy(offset, logical, common, want))
            if not copies:
                continue
            if (target := _target_of(copies, last - first, dtype)) is not None:
                self.read_chunk(file, read.name, read.piece, index, target)
                continue
            chunk = self.read_chunk(file, read.name, read.piece, index).view(dtype)
            for copy in copies:
                shape_here = lengths(copy.logical)
                source = chunk[copy.offset : copy.offset + math.prod(shape_here)].view(shape_here)
                wanted = copy.want.storage[_within(copy.common, copy.want.box)]
                wanted.copy_(source[_within(copy.common, copy.logical)])

    @contextmanager
    def open(self, name: str) -> Iterator[SourceFile]:
        """Open a file of pieces, and verify its length and its header when it is opened for the first time.

        Raises: CheckpointError: if it is missing, truncated, or its header is damaged.
        """
        record = self.manifest.files[name]
        with closing(open_regular(self.directory / name)) as file:
            if name not in self._verified:
                if file.size != record.bytes:
                    raise damage(self.directory, name, f"has {file.size} bytes, the manifest says {record.bytes}")
                if digest(file.read(record.header_bytes)) != record.header_xxh3:
                    span = f"{name}, bytes 0..{record.header_bytes}"
                    raise damage(self.directory, span, "do not match the checksum of the header: they are damaged")
                self._verified.add(name)
            yield file

    def read_chunk(
        self, file: SourceFile, name: str, piece: Piece, index: int, target: memoryview | None = None
    ) -> Tensor:
        """Read and verify one chunk of a piece.

        Args:
            file: that the piece is in.
            name: of its tensor.
            piece, index: which chunk.
            target: memory of the chunk's length that it is read into.

        Returns: [bytes] uint8, valid until the next one is read; empty where a target was given.

        Raises: CheckpointError: if its checksum differs.
        """
        begin = index * self.manifest.chunk_bytes
        length = min(self.manifest.chunk_bytes, piece.bytes - begin)
        if target is None and len(self._chunk) < length:
            self._chunk = torch.empty(length, dtype=torch.uint8)
        chunk = self._chunk[: 0 if target is not None else length]
        buffer = chunk.numpy().data if target is None else target
        span = f"{piece.file}, bytes {piece.offset + begin}..{piece.offset + begin + length}"
        try:
            done = file.read_into(buffer, piece.offset + begin)
        except OSError as error:
            raise damage(self.directory, span, f"of tensor {name} cannot be read: {error.strerror or error}") from None
        # A file that shrank since it was opened gives less.
        if done < length or digest(buffer) != piece.xxh3[index]:
            raise damage(self.directory, span, f"of tensor {name} do not match their checksum: they are damaged")
        return chunk


def _target_of(copies: Sequence[_Copy], numel: int, dtype: torch.dtype) -> memoryview | None:
    """Return the memory that a chunk of `numel` elements goes to as it is, or None where it must be taken apart."""
    if len({id(copy.want) for copy in copies}) > 1 or sum(math.prod(lengths(copy.common)) for copy in copies) < numel:
        return None
    want = copies[0].want
    storage = want.storage
    if storage.dtype != dtype or storage.device.type != "cpu" or not storage.is_contiguous():
        return None
    # Boxes of a run are in order: they lie behind each other in the wanted box too if first and last are as far apart.
    start, end = copies[0].first_in_want(), copies[-1].last_in_want()
    if end - start != numel:
        return None
    flat: memoryview = storage.view(-1)[start:end].view(torch.uint8).numpy().data
    return flat


def tensor_shard(name: str, record: TensorRecord, box: Box, dtype: torch.dtype) -> Shard:
    """Return an empty shard for one box of a tensor, to be filled by `Reader.fill`: [shape of the box]."""
    storage = torch.empty(lengths(box), dtype=dtype)
    return Shard(name, record.shape, storage, [Extent(whole(lengths(box)), box)])


def _within(box: Box, outer: Box) -> Box:
    """Return a box in coordinates that start at the corner of `outer`."""
    return shift(box, outer, whole(lengths(outer)))


def _convertible(source: torch.dtype, target: torch.dtype, cast: bool) -> bool:
    return source == target or (cast and source.is_floating_point and target.is_floating_point)
