"""Saving: every rank writes its own pieces, and the checkpoint appears whole or not at all.

    all     write step_00001000.tmp/rank_<r>.safetensors, fsync
    all     gather the tables of pieces
    rank 0  write state.json and manifest.json, fsync files and directory
    rank 0  rename to step_00001000, then replace `latest`
    rank 0  delete what `keep` no longer wants

A kill at any point leaves `latest` on a complete checkpoint. A step that exists already (a run that was set back and
came to the same step again) steps aside as `step_00001000.old` until the new one is in place.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megascratch.checkpoint.format import (
    CHUNK_BYTES,
    DTYPE_NAMES,
    LATEST,
    MANIFEST,
    STATE,
    FileRecord,
    Manifest,
    Piece,
    Shard,
    Table,
    TensorRecord,
    digest,
    piece_key,
)
from megascratch.dist.comm import gather_bytes
from megascratch.dist.layout import Box, lengths
from megascratch.dist.mesh import Axis
from megascratch.errors import CheckpointError, Problem

STEP_NAME = re.compile(r"step_\d{8,18}")

T = TypeVar("T")


@dataclass(frozen=True)
class NewPiece:
    """A box of a logical tensor that is to be written; `value` makes it, [shape of the box], when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    value: Callable[[], Tensor]


def save(
    root: Path,
    step: int,
    shards: Sequence[Shard],
    state: Mapping[str, Any],
    world: Axis,
    keep: int = 0,
    device: torch.device | None = None,
) -> Path:
    """Write a checkpoint `root/step_<step>`. Every rank of `world` calls this at the same point.

    Args:
        root: directory of checkpoints, seen by all ranks; made where it is missing.
        step: training steps done.
        shards: this rank's parts; those with `writes` must tile every tensor once over all ranks.
        state: what JSON can say; rank 0's is written. `step` is added.
        world: all ranks.
        keep: how many of the newest complete checkpoints stay; 0 keeps all. The one just saved always stays.
        device: where the backend wants the tensors that it gathers; CPU when left out.

    Returns: the directory.

    Raises: CheckpointError: on every rank, if any of them could not write; what was there before is untouched.
    """
    final = root / f"step_{step:08d}"
    unfinished = final.with_name(final.name + ".tmp")
    state_bytes = json.dumps({**state, "step": step}, indent=1, allow_nan=False).encode()

    def prepare() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was killed
        unfinished.mkdir(parents=True)

    def write() -> Any:
        pieces = [
            NewPiece(shard.name, shard.shape, shard.tensor.dtype, extent.logical, partial(shard.part, extent))
            for shard in shards
            if shard.writes
            for extent in shard.extents
        ]
        return write_pieces(unfinished / f"rank_{world.rank:05d}.safetensors", pieces).model_dump(mode="json")

    def publish() -> None:
        manifest = Manifest.build(step, map(Table.model_validate_json, tables), CHUNK_BYTES, state_bytes, final)
        write_contents(unfinished, manifest, state_bytes)
        _swap_in(unfinished, final)
        _replace_text(root / LATEST, final.name)
        shutil.rmtree(_aside(final), ignore_errors=True)
        prune(root, keep, final)

    try:
        _together(prepare if world.is_first else None, final, world, device)
        tables = [json.dumps(table) for table in _together(write, final, world, device)]
        _together(publish if world.is_first else None, final, world, device)
    except CheckpointError:
        if world.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk should not stay full of half a checkpoint
        raise
    return final


def write_pieces(path: Path, pieces: Iterable[NewPiece], advance: Callable[[float], None] = lambda _: None) -> Table:
    """Write pieces into a new safetensors file, one at a time, and flush it to the disk.

    Args:
        path: must not exist.
        pieces: in any order; wide elements are written first, so that each is aligned as readers expect.
        advance: is told the number of elements of each piece that was written.

    Returns: the file and its pieces. With no pieces no file is written.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    if not pieces:
        return Table(files={}, tensors={})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for piece in pieces:
        start, end = end, end + math.prod(lengths(piece.box)) * piece.dtype.itemsize
        key = piece_key(piece.name, piece.shape, piece.box)
        assert key not in header, f"{key} is written twice by one rank"
        header[key] = {"dtype": DTYPE_NAMES[piece.dtype], "shape": lengths(piece.box), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin on a multiple of 8 bytes
    text = len(text).to_bytes(8, "little") + text
    tensors: dict[str, TensorRecord] = {}
    with path.open("xb") as file:
        file.write(text)
        for piece in pieces:
            offset = file.tell()
            data = _bytes_of(piece)
            sums = []
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                sums.append(digest(chunk))
                file.write(chunk)
            box = tuple((s.start, s.stop) for s in piece.box)
            stored = Piece(box=box, file=path.name, offset=offset, bytes=len(data), xxh3=tuple(sums))
            others = tensors[piece.name].pieces if piece.name in tensors else ()
            dtype = DTYPE_NAMES[piece.dtype]
            tensors[piece.name] = TensorRecord(shape=piece.shape, dtype=dtype, pieces=(*others, stored))
            advance(math.prod(lengths(piece.box)))
        file.flush()
        os.fsync(file.fileno())
    record = FileRecord(bytes=len(text) + end, header_bytes=len(text), header_xxh3=digest(text))
    return Table(files={path.name: record}, tensors=tensors)


def _bytes_of(piece: NewPiece) -> memoryview:
    """Return a piece's elements, row by row; without a copy where they lie so in this machine's memory."""
    value = piece.value()
    assert value.shape == lengths(piece.box), f"{piece.name}: {tuple(value.shape)} is not the shape of {piece.box}"
    assert value.dtype == piece.dtype
    return value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def write_contents(directory: Path, manifest: Manifest, state: bytes) -> None:
    """Add `state.json` and `manifest.json` to a directory of pieces, and flush all to the disk."""
    _write_flushed(directory / STATE, state)
    _write_flushed(directory / MANIFEST, manifest.model_dump_json().encode())
    _flush_directory(directory)


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
        _flush_directory(folder)
        folder.rename(path)
        _flush_directory(path.parent)
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise CheckpointError(
            Problem(str(error.filename or path), rule, "make room, or choose another place")
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def complete_steps(root: Path) -> list[Path]:
    """Return the complete checkpoints of a directory, the newest last."""
    found = [path for path in root.glob("step_*") if STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))


def prune(root: Path, keep: int, saved: Path) -> None:
    """Delete all but the `keep` newest checkpoints, and never the one just saved; 0 keeps all.

    Newest is last written, not highest step: after a run was set back, the abandoned higher steps go first.
    """
    others = [path for path in complete_steps(root) if path != saved]
    for path in others[: max(0, len(others) - (keep - 1))] if keep > 0 else ():
        doomed = path.with_name(path.name + ".tmp")  # from here on it does not look complete
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _aside(final: Path) -> Path:
    return final.with_name(final.name + ".old")


def _swap_in(unfinished: Path, final: Path) -> None:
    """Put a finished directory in its place. `find` falls back on the one set aside, should we be killed between."""
    if final.exists():
        shutil.rmtree(_aside(final), ignore_errors=True)
        final.rename(_aside(final))
    unfinished.rename(final)
    _flush_directory(final.parent)


def _replace_text(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".tmp")
    fresh.unlink(missing_ok=True)
    _write_flushed(fresh, f"{text}\n".encode())
    fresh.replace(path)
    _flush_directory(path.parent)


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(action: Callable[[], Any] | None, final: Path, world: Axis, device: torch.device | None) -> list[Any]:
    """Run an action on this rank and return every rank's result; wait until all are through.

    A rank that fails must not leave the others waiting in a collective, so failures are gathered like results.
    """
    try:
        answer = {"value": action() if action else None}
    except CheckpointError as error:
        answer = {"problems": [[p.value, p.rule, p.remedy] for p in error.problems]}
    except OSError as error:
        value = f"rank {world.rank}: {error.filename or final}"
        remedy = "make room, or choose a checkpoint.dir that every rank can write to"
        answer = {"problems": [[value, f"cannot be written: {error.strerror or error}", remedy]]}
    answers = [json.loads(data) for data in gather_bytes(json.dumps(answer).encode(), world, device)]
    problems = [Problem(*problem) for other in answers for problem in other.get("problems", ())]
    if problems:
        raise CheckpointError(problems, str(final))
    return [other["value"] for other in answers]
