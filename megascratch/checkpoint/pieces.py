"""Writing pieces into files, and files into a directory that appears whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from megascratch.checkpoint.format import (
    CHUNK_BYTES,
    DTYPE_NAMES,
    MANIFEST,
    STATE,
    FileRecord,
    Manifest,
    Piece,
    Table,
    TensorRecord,
    digest,
    piece_key,
)
from megascratch.checkpoint.places import create, flush, flush_directory, remove_tree, start_flush, write_flushed
from megascratch.dist.layout import Box, lengths
from megascratch.errors import CheckpointError, Problem

_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class NewPiece:
    """A box of a logical tensor that is to be written.

    `value` makes it, [shape of the box], when its turn comes; `blocks`, where it is given, makes blocks of rows that
    follow each other, so that it need not be in memory as a whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    value: Callable[[], Tensor]
    blocks: Callable[[], Iterator[Tensor]] | None = None

    @property
    def bytes(self) -> int:
        return math.prod(lengths(self.box)) * self.dtype.itemsize


def write_pieces(
    path: Path,
    pieces: Iterable[NewPiece],
    advance: Callable[[float], None] = lambda _: None,
    *,
    over: bool = False,
) -> Table:
    """Write pieces into a new safetensors file, one at a time, and flush it to the disk.

    Args:
        path: must not exist, but where it is written over.
        pieces: in any order; wide elements are written first, so that each is aligned as readers expect.
        advance: is told the number of elements of each piece that was written.
        over: take the space of a file that is there.

    Returns: the file and its pieces. With no pieces no file is written.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    if not pieces:
        return Table(files={}, tensors={})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for piece in pieces:
        start, end = end, end + piece.bytes
        key = piece_key(piece.name, piece.shape, piece.box)
        assert key not in header, f"{key} is written twice by one rank"
        header[key] = {"dtype": DTYPE_NAMES[piece.dtype], "shape": lengths(piece.box), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin on a multiple of 8 bytes
    text = len(text).to_bytes(8, "little") + text
    tensors: dict[str, TensorRecord] = {}
    with create(path, over=over) as file:
        file.write(text)
        start = 0
        for piece in pieces:
            sums: list[str] = []
            for chunk in _chunks_of(piece):
                sums.append(_write_hashed(file, chunk))
                start_flush(file, path, len(text) + start + (len(sums) - 1) * CHUNK_BYTES, len(chunk))
            box = tuple((s.start, s.stop) for s in piece.box)
            stored = Piece(box=box, file=path.name, offset=len(text) + start, bytes=piece.bytes, xxh3=tuple(sums))
            others = tensors[piece.name].pieces if piece.name in tensors else ()
            dtype = DTYPE_NAMES[piece.dtype]
            tensors[piece.name] = TensorRecord(shape=piece.shape, dtype=dtype, pieces=(*others, stored))
            start += piece.bytes
            advance(math.prod(lengths(piece.box)))
        flush(file, path)
    record = FileRecord(bytes=len(text) + end, header_bytes=len(text), header_xxh3=digest(text))
    return Table(files={path.name: record}, tensors=tensors)


def _write_hashed(file: BinaryIO, chunk: memoryview) -> str:
    """Write a chunk and return its checksum, in parts that stay in the cache between the two.

    Linux takes parts of this size faster, too: where a RAM disk's pages are there, 13 GB/s for 9 with chunks of 4 MiB.
    """
    checksum = xxhash.xxh3_64()
    for begin in range(0, len(chunk), _PART_BYTES):
        part = chunk[begin : begin + _PART_BYTES]
        checksum.update(part)
        file.write(part)
    return checksum.hexdigest()


def _chunks_of(piece: NewPiece) -> Iterator[memoryview]:
    """Yield a piece's elements, row by row, in chunks of `CHUNK_BYTES`; without a copy where they lie so in memory."""
    if piece.blocks is None:
        value = piece.value()
        assert value.shape == lengths(piece.box), f"{piece.name}: {tuple(value.shape)} is not the shape of {piece.box}"
        data = _bytes_of(value, piece)
        yield from (data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES))
        return
    rest, done = bytearray(), 0
    for block in piece.blocks():
        rest += _bytes_of(block, piece)
        whole_chunks = len(rest) // CHUNK_BYTES * CHUNK_BYTES
        ready = memoryview(bytes(rest[:whole_chunks]))
        yield from (ready[begin : begin + CHUNK_BYTES] for begin in range(0, whole_chunks, CHUNK_BYTES))
        del rest[:whole_chunks]
        done += whole_chunks
    assert done + len(rest) == piece.bytes, f"{piece.name}: {done + len(rest)} bytes are not those of {piece.box}"
    if rest:
        yield memoryview(bytes(rest))


def _bytes_of(value: Tensor, piece: NewPiece) -> memoryview:
    assert value.dtype == piece.dtype
    return value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def write_contents(directory: Path, manifest: Manifest, state: bytes) -> None:
    """Add `state.json` and `manifest.json` to a directory of pieces, and flush all to the disk."""
    write_flushed(directory / STATE, state)
    write_flushed(directory / MANIFEST, manifest.model_dump_json().encode())
    flush_directory(directory)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory that appears whole or not at all: yields an unfinished one, and renames it at the end.

    Raises: CheckpointError: if `path` exists, or cannot be written to.
    """
    if os.path.lexists(path):
        raise CheckpointError(Problem(str(path), "exists already: nothing is overwritten", "give another directory"))
    folder = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        flush_directory(folder)
        folder.rename(path)
        flush_directory(path.parent)
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise CheckpointError(
            Problem(str(error.filename or path), rule, "make room, or choose another place")
        ) from None
    finally:
        remove_tree(folder)
