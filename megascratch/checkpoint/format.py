"""What a checkpoint is on disk: the manifest, its rules, and the `Shard` that a rank saves from or loads into.

    step_00001000/
      manifest.json           per logical tensor: shape, dtype, and the pieces that tile it
      rank_00000.safetensors  pieces; any safetensors reader opens them
      state.json              step, consumed samples, random state, resolved configuration
    latest                    the name of the newest complete checkpoint

By hand, `w` [4, 6] in float32, saved by two tensor-parallel ranks that hold three columns each. Each writes one piece
of 4 · 3 · 4 = 48 bytes, and the manifest says which box of the logical tensor it is:

    "w": {"shape": [4, 6], "dtype": "F32", "pieces": [
        {"box": [[0, 4], [0, 3]], "file": "rank_00000.safetensors", "offset": 96, "bytes": 48, "xxh3": ["…"]},
        {"box": [[0, 4], [3, 6]], "file": "rank_00001.safetensors", "offset": 96, "bytes": 48, "xxh3": ["…"]}]}

A rank that now wants rows 2 and 3 intersects [2:4, 0:6] with both boxes and reads the second half of each piece: the
layout that saved is nowhere on disk, so resharding is loading.

A piece has one checksum for every `chunk_bytes` of it, because a rank that needs a part must not accept a flipped bit
there, nor read the rest to know. The manifest, `state.json` and each file's header have checksums of their own.

Nothing in a manifest is believed: names stay in the directory, boxes tile their tensor without hole or overlap, and
offsets and sizes lie inside files of the stated length, before any memory is taken for them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from megascratch.checkpoint.places import SourceFile
from megascratch.dist.layout import Box, Extent, lengths
from megascratch.errors import DamagedCheckpoint, Problem

FORMAT = "megascratch checkpoint"
VERSION = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
CHUNK_BYTES = 4 << 20  # small enough to stay in cache between checksum and copy, large enough to hide Python's part
LARGEST_CHUNK_BYTES = 64 << 20
LARGEST_MANIFEST_BYTES = 256 << 20  # a 405B model with its optimizer on 10,000 ranks needs about a tenth
LARGEST_STATE_BYTES = 64 << 20
LARGEST_NUMEL = 1 << 60
OPTIMIZER = "optim/"  # optimizer state is named optim/<slot>/<parameter>

# By the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_RESTORE = "restore the file, or load another checkpoint"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,299}")


@dataclass(frozen=True)
class Shard:
    """One rank's part of one logical tensor.

    Attributes:
        name: logical name.
        shape: logical shape.
        tensor: local storage: the n-dimensional part, or a 1-dimensional run of it (ZeRO); saved in its own dtype.
        extents: from `dist.layout.extents` or `run_extents`; a 1-dimensional run holds its logical box row by row.
        writes: whether copies like this one are saved; loading ignores it, and the next two.
        replica: number of this copy among the ranks that hold the same, and share the writing.
        replicas: how many of them there are.
        casts: whether numbers of another floating-point dtype may be loaded into it, and are converted.
        optional: whether loading leaves the tensor as it is where a checkpoint has none of the name.
        stand_in: the tensor that it is loaded from where a checkpoint does not have it; None for none.
    """

    name: str
    shape: tuple[int, ...]
    tensor: Tensor
    extents: Sequence[Extent]
    writes: bool = True
    replica: int = 0
    replicas: int = 1
    casts: bool = False
    optional: bool = False
    stand_in: str | None = None

    def part(self, extent: Extent) -> Tensor:
        """Return a view of the local storage with the shape of the extent's logical box."""
        return self.tensor.detach()[extent.local].view(lengths(extent.logical))


def whole(shape: Sequence[int]) -> Box:
    """Return the box that covers a tensor."""
    return tuple(slice(0, n) for n in shape)


def piece_key(name: str, shape: Sequence[int], box: Box) -> str:
    """Return the name of a piece inside its safetensors file: the tensor's own where the piece is all of it."""
    if box == whole(shape):
        return name
    return f"{name}[{','.join(f'{s.start}:{s.stop}' for s in box)}]"


def digest(data: Any) -> str:
    """Return the checksum of a buffer: xxh3 of 64 bits, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def damage(where: Path, value: str, rule: str, remedy: str = _RESTORE) -> DamagedCheckpoint:
    """Return the error for a checkpoint that is not what it should be."""
    return DamagedCheckpoint(Problem(value, rule, remedy), str(where))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Piece(_Record):
    """One stored box of a tensor: `box` in logical coordinates, and its bytes in a file, row by row."""

    box: tuple[tuple[int, int], ...]
    file: str
    offset: int
    bytes: int
    xxh3: tuple[str, ...]  # of each chunk

    @property
    def slices(self) -> Box:
        return tuple(slice(start, stop) for start, stop in self.box)


class TensorRecord(_Record):
    """A logical tensor and the pieces that tile it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


class FileRecord(_Record):
    """Length of a safetensors file, and its header: the length word and the JSON after it."""

    bytes: int
    header_bytes: int
    header_xxh3: str


class Blob(_Record):
    """Length and checksum of a file that is read whole."""

    bytes: int
    xxh3: str


class Table(_Record):
    """The files and pieces of one rank, or of a whole checkpoint."""

    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


class _Heading(BaseModel):
    format: str = ""
    version: int = 0


class Manifest(Table):
    """The table of contents of a checkpoint; `xxh3` is the checksum of the rest."""

    format: str
    version: int
    step: int
    chunk_bytes: int
    state: Blob
    xxh3: str

    @classmethod
    def build(cls, step: int, tables: Iterable[Table], chunk_bytes: int, state: bytes, where: Path) -> "Manifest":
        """Merge the tables of all ranks.

        Raises: CheckpointError: if the pieces of a tensor do not tile it, so that a bad checkpoint is never published.
        """
        files: dict[str, FileRecord] = {}
        parts: dict[str, list[TensorRecord]] = {}
        for table in tables:
            files.update(table.files)
            for name, part in table.tensors.items():
                parts.setdefault(name, []).append(part)
        tensors = {}
        for name, records in parts.items():
            kinds = list(dict.fromkeys(f"{r.dtype} {list(r.shape)}" for r in records))
            if len(kinds) > 1:
                raise damage(where, f"tensor {name}", f"is {kinds[0]} on one rank and {kinds[1]} on another")
            pieces = tuple(piece for record in records for piece in record.pieces)
            tensors[name] = records[0].model_copy(update={"pieces": pieces})
        manifest = cls(
            format=FORMAT,
            version=VERSION,
            step=step,
            chunk_bytes=chunk_bytes,
            state=Blob(bytes=len(state), xxh3=digest(state)),
            files=files,
            tensors=tensors,
            xxh3="",
        )
        _check(manifest, where)
        return manifest.model_copy(update={"xxh3": manifest.own_digest()})

    def own_digest(self) -> str:
        return digest(self.model_copy(update={"xxh3": ""}).model_dump_json().encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check `manifest.json`.

        Raises: CheckpointError: if it is missing, damaged, of another version, or breaks a rule of the format.
        """
        path = directory / MANIFEST
        data = read_bounded(path, LARGEST_MANIFEST_BYTES)
        try:
            heading = _Heading.model_validate_json(data)
        except ValidationError:
            raise damage(path, MANIFEST, "is not the JSON of a checkpoint's manifest: it is damaged") from None
        if heading.format != FORMAT:
            raise damage(path, f"format = {heading.format[:40]!r}", f"must be {FORMAT!r}", "give another directory")
        if heading.version != VERSION:
            remedy = "use the megascratch that wrote it, or a newer one"
            raise damage(path, f"version = {heading.version}", f"this megascratch reads version {VERSION}", remedy)
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise damage(path, key[:200], f"breaks the format: {first['msg']}") from None
        if manifest.own_digest() != manifest.xxh3:
            raise damage(path, MANIFEST, "does not match its own checksum: it is damaged")
        _check(manifest, path)
        return manifest


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Read a small file whole, after looking at its size.

    Raises: CheckpointError: if it is missing, is no regular file, or is larger than the limit.
    """
    with closing(open_regular(path)) as file:
        if file.size > limit_bytes:
            raise damage(path.parent, path.name, f"has {file.size} bytes, more than the {limit_bytes} it may have")
        return file.read(file.size)


def open_regular(path: Path) -> SourceFile:
    """Open a file of a checkpoint for reading.

    Raises: CheckpointError: if it is missing, or is a link or a device, which could lead out of the directory or hang.
    """
    try:
        file = SourceFile(path)
    except FileNotFoundError:
        raise damage(path.parent, path.name, "is missing") from None
    except OSError as error:
        raise damage(path.parent, path.name, f"cannot be opened: {error.strerror or error}") from None
    if not file.is_regular:
        file.close()
        raise damage(path.parent, path.name, "is not a regular file")
    return file


def _check(manifest: Manifest, where: Path) -> None:
    """Raise for the first rule that a manifest breaks; after this its numbers can be relied on."""
    chunk = manifest.chunk_bytes
    if not (0 < chunk <= LARGEST_CHUNK_BYTES and chunk % 8 == 0):
        raise damage(where, f"chunk_bytes = {chunk}", f"must be a multiple of 8, at most {LARGEST_CHUNK_BYTES}")
    for name, file in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise damage(
                where, f"file {name[:80]!r}", "must be a plain *.safetensors name in the checkpoint's directory"
            )
        if not 8 <= file.header_bytes <= min(file.bytes, LARGEST_MANIFEST_BYTES):
            raise damage(where, name, f"has an impossible header of {file.header_bytes} bytes")
    for name, record in manifest.tensors.items():
        if not _TENSOR_NAME.fullmatch(name):
            raise damage(where, f"tensor {name[:80]!r}", "must be named with letters, digits and . _ / - alone")
        if record.dtype not in DTYPES:
            raise damage(where, f"tensor {name}: dtype {record.dtype[:20]!r}", f"must be one of {', '.join(DTYPES)}")
        if len(record.shape) > 8 or any(n < 1 for n in record.shape) or math.prod(record.shape) > LARGEST_NUMEL:
            raise damage(where, f"tensor {name}", f"has an impossible shape {list(record.shape)[:9]}")
        for piece in record.pieces:
            _check_piece(manifest.files, chunk, name, record, piece, where)
        check_tiling(name, record.shape, [piece.slices for piece in record.pieces], where)


def _check_piece(
    files: Mapping[str, FileRecord], chunk: int, name: str, record: TensorRecord, piece: Piece, where: Path
) -> None:
    here = f"tensor {name}, piece {[list(b) for b in piece.box[:8]]}"
    inside = len(piece.box) == len(record.shape) and all(0 <= a < b <= n for (a, b), n in zip(piece.box, record.shape))
    if not inside:
        raise damage(where, here, f"must lie inside shape {list(record.shape)}")
    if piece.file not in files:
        raise damage(where, f"{here}: file {piece.file[:80]!r}", "is not in the manifest's list of files")
    expected = math.prod(lengths(piece.slices)) * DTYPES[record.dtype].itemsize
    if piece.bytes != expected:
        raise damage(where, here, f"has {piece.bytes} bytes where its box has {expected}")
    file = files[piece.file]
    if not file.header_bytes <= piece.offset <= file.bytes - piece.bytes:
        span = f"{piece.offset}..{piece.offset + piece.bytes}"
        raise damage(where, here, f"claims bytes {span} of {piece.file}, which has {file.bytes}")
    if len(piece.xxh3) != -(-piece.bytes // chunk):
        raise damage(where, here, f"has {len(piece.xxh3)} checksums for {-(-piece.bytes // chunk)} chunks")


def check_tiling(name: str, shape: Sequence[int], boxes: Sequence[Box], where: Path) -> None:
    """Check that boxes inside a shape cover every element exactly once.

    Equal volumes and no two boxes in common mean just that. Boxes are swept along the dimension with the most distinct
    starts, so that each is compared with the few still open there and not with all others.

    Raises: CheckpointError: naming the overlap, or how much is not covered.
    """
    volume = sum(math.prod(lengths(box)) for box in boxes)
    missing = math.prod(shape) - volume
    if missing > 0:
        raise damage(where, f"tensor {name}", f"lacks {missing} of its {math.prod(shape)} elements: no piece has them")
    dims = range(len(shape))
    sweep = max(dims, key=lambda d: len({box[d].start for box in boxes}), default=None)
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda b: [s.start for s in b] if sweep is None else b[sweep].start):
        if sweep is not None:
            open_boxes = [other for other in open_boxes if other[sweep].stop > box[sweep].start]
        for other in open_boxes:
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(box, other)):
                both = f"{piece_key(name, (), other)} and {piece_key(name, (), box)}"
                raise damage(where, f"tensor {name}", f"has pieces that overlap: {both}")
        open_boxes.append(box)
