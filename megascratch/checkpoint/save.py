"""Saving: every rank writes its own pieces, and the checkpoint appears whole or not at all.

    rank 0  make step_00001000.tmp/                                          begin
    all     write step_00001000.tmp/rank_<r>.safetensors, fsync              write: in the background, if asked
    all     gather the tables of pieces                                      publish
    rank 0  write state.json and manifest.json, fsync files and directory
    rank 0  rename to step_00001000, then replace `latest`
    rank 0  delete what `keep` no longer wants

A kill at any point leaves `latest` on a complete checkpoint. A step that exists already (a run that was set back and
came to the same step again) steps aside as `step_00001000.old` until the new one is in place. Behind a URL nothing can
be renamed: pieces go where they stay, the manifest comes last, and a step that exists already gets a directory of its
own, `step_00001000.1`.

Ranks that hold the same share the writing. By hand, for 2 ranks that hold a [3, 4] and b [2, 4] in float32, 48 and 32
bytes: each is to write 40, which ends after row 2.5 of a, so rank 0 writes rows 0 to 2 of a, and rank 1 all of b.
"""

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megascratch.checkpoint.format import CHUNK_BYTES, LATEST, MANIFEST, Manifest, Shard, Table
from megascratch.checkpoint.pieces import NewPiece, write_contents, write_pieces
from megascratch.checkpoint.places import (
    flush_directory,
    is_local,
    remove_tree,
    replace_text,
)
from megascratch.checkpoint.retention import aside, prune, take_spare
from megascratch.checkpoint.staging import Staging
from megascratch.dist.comm import gather_bytes
from megascratch.dist.layout import Extent, lengths
from megascratch.dist.mesh import Axis
from megascratch.errors import CheckpointError, Problem

T = TypeVar("T")


def save(
    root: Path,
    step: int,
    shards: Sequence[Shard],
    state: Mapping[str, Any],
    world: Axis,
    keep: int = 0,
    device: torch.device | None = None,
    recycle: bool = False,
) -> Path:
    """Write a checkpoint `root/step_<step>`. Every rank of `world` calls this at the same point.

    Args:
        root: directory of checkpoints, seen by all ranks; made where it is missing.
        step: training steps done.
        shards: this rank's parts; those with `writes` must tile every tensor once over all ranks, replicas aside.
        state: what JSON can say; rank 0's is written. `step` is added.
        world: all ranks.
        keep: how many of the newest complete checkpoints stay; 0 keeps all. The one just saved always stays.
        device: where the backend wants the tensors that it gathers; CPU when left out.
        recycle: write over the files of a checkpoint that `keep` no longer wants, which therefore stay until the next
            save; only for paths. On a RAM disk that is twice as fast as taking new pages; whoever still reads the old
            one reads nonsense. A file with a second name (a hard link) is left as it is.

    Returns: the directory.

    Raises: CheckpointError: on every rank, if any of them could not write; what was there before is untouched.
    """
    saving = Saving(root, step, shards, state, world, device, recycle=recycle)
    saving.write()
    return saving.publish(clean=partial(prune, root, keep, recycle=recycle))


class Saving:
    """A checkpoint on its way. Every rank begins and publishes it at the same point; in between each writes by itself.

    Args:
        root, step, shards, state, world, device, recycle: as for `save`.
        staging: takes a copy of the shards, so that they may change before they are written.

    Raises: CheckpointError: on every rank, if the directory cannot be made.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        shards: Sequence[Shard],
        state: Mapping[str, Any],
        world: Axis,
        device: torch.device | None = None,
        staging: Staging | None = None,
        *,
        recycle: bool = False,
    ) -> None:
        self._recycle = recycle
        self.root, self.step, self.world, self._device = root, step, world, device
        self._state = json.dumps({**state, "step": step}, indent=1, allow_nan=False).encode()
        self._final = root / f"step_{step:08d}"
        begin = (lambda: begin_directory(self._final, recycle=recycle).name) if world.is_first else None
        names = self._together(self._attempt(begin))
        self._folder = root / names[0]
        self._pieces = shared_pieces(shards)
        if staging is not None:
            copies = staging.copy([(piece.dtype, lengths(piece.box), piece.value) for piece in self._pieces])
            self._pieces = [_with_value(piece, copy) for piece, copy in zip(self._pieces, copies)]
        self._written: dict[str, Any] | None = None
        self._writer: threading.Thread | None = None

    def start(self) -> None:
        """Write this rank's pieces in the background."""
        self._writer = threading.Thread(target=self.write, name=f"save step {self.step}", daemon=True)
        self._writer.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's pieces are still being written in the background."""
        return self._writer is not None and self._writer.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until this rank's pieces are written, or for so long."""
        if self._writer is not None:
            self._writer.join(timeout_s)

    def write(self) -> None:
        """Write this rank's pieces; what goes wrong is told by `publish`."""
        file = self._folder / f"rank_{self.world.rank:05d}.safetensors"
        self._written = self._attempt(
            lambda: write_pieces(file, self._pieces, over=self._recycle).model_dump(mode="json")
        )
        self._pieces = []

    def publish(self, clean: Callable[[Path], None]) -> Path:
        """Put the checkpoint in its place, once all ranks have written.

        Args:
            clean: called on the first rank with the new directory, to delete older ones.

        Returns: its directory.

        Raises: CheckpointError: on every rank, if any of them could not write; what was there before is untouched.
        """
        self.wait()
        assert self._written is not None, "nothing was written"
        try:
            tables = [json.dumps(table) for table in self._together(self._written)]
            publish = partial(self._publish, tables, clean) if self.world.is_first else None
            names = self._together(self._attempt(publish))
        except CheckpointError:
            if self.world.is_first:
                self.abandon()
            raise
        return self.root / names[0]

    def abandon(self) -> None:
        """Delete what was written: a full disk should not stay full of half a checkpoint."""
        remove_tree(self._folder)

    def _publish(self, tables: Sequence[str], clean: Callable[[Path], None]) -> str:
        parsed = map(Table.model_validate_json, tables)
        manifest = Manifest.build(self.step, parsed, CHUNK_BYTES, self._state, self._final)
        for file in self._folder.iterdir() if self._recycle else ():
            if file.name not in manifest.files:  # of a layout with more ranks
                file.unlink()
        write_contents(self._folder, manifest, self._state)
        final = end_directory(self._folder, self._final)
        clean(final)
        return final.name

    def _attempt(self, action: Callable[[], Any] | None) -> dict[str, Any]:
        """Run an action on this rank: its value or its problems, as JSON can say them."""
        try:
            return {"value": action() if action else None}
        except CheckpointError as error:
            return {"problems": [[p.value, p.rule, p.remedy] for p in error.problems]}
        except OSError as error:
            value = f"rank {self.world.rank}: {error.filename or self._final}"
            remedy = "make room, or choose a checkpoint.dir that every rank can write to"
            return {"problems": [[value, f"cannot be written: {error.strerror or error}", remedy]]}

    def _together(self, answer: Mapping[str, Any]) -> list[Any]:
        """Return every rank's value; wait until all are through.

        A rank that fails must not leave the others waiting in a collective, so failures are gathered like results.
        """
        gathered = gather_bytes(json.dumps(answer).encode(), self.world, self._device)
        answers = [json.loads(data) for data in gathered]
        problems = [Problem(*problem) for other in answers for problem in other.get("problems", ())]
        if problems:
            raise CheckpointError(problems, str(self._final))
        return [other["value"] for other in answers]


def shared_pieces(shards: Iterable[Shard]) -> list[NewPiece]:
    """Return what this rank is to write: of what several ranks hold, an equal run of bytes, cut between rows."""
    groups: dict[tuple[int, int], list[tuple[Shard, Extent]]] = {}
    for shard in shards:
        if shard.writes:
            group = groups.setdefault((shard.replica, shard.replicas), [])
            group += [(shard, extent) for extent in shard.extents]
    pieces = []
    for (replica, replicas), parts in groups.items():
        total = sum(math.prod(lengths(extent.logical)) * shard.tensor.itemsize for shard, extent in parts)
        first, last = total * replica // replicas, total * (replica + 1) // replicas
        position = 0
        for shard, extent in parts:
            n_rows, *rest = lengths(extent.logical) or (1,)
            row_bytes = math.prod(rest) * shard.tensor.itemsize
            start, stop = (min(n_rows, max(0, -(-(cut - position) // row_bytes))) for cut in (first, last))
            position += n_rows * row_bytes
            if start < stop:
                pieces.append(_piece_of(shard, extent, start, stop))
    return pieces


def _piece_of(shard: Shard, extent: Extent, start: int, stop: int) -> NewPiece:
    """Return rows start ≤ i < stop of an extent."""
    if not extent.logical:
        return NewPiece(shard.name, shard.shape, shard.tensor.dtype, (), partial(shard.part, extent))
    first = extent.logical[0].start
    box = (slice(first + start, first + stop), *extent.logical[1:])
    value = partial(lambda shard, extent: shard.part(extent)[start:stop], shard, extent)
    return NewPiece(shard.name, shard.shape, shard.tensor.dtype, box, value)


def _with_value(piece: NewPiece, value: Callable[[], Tensor]) -> NewPiece:
    return NewPiece(piece.name, piece.shape, piece.dtype, piece.box, value)


def begin_directory(final: Path, *, recycle: bool = False) -> Path:
    """Make the directory that a checkpoint is written into before it is one.

    Args:
        final: where it is to be.
        recycle: as for `save`.
    """
    if is_local(final):
        folder = final.with_name(final.name + ".tmp")
    else:
        names = (final.name + (f".{n}" if n else "") for n in range(10_000))
        folder = next(final.parent / name for name in names if not (final.parent / name / MANIFEST).exists())
    remove_tree(folder)  # of a save that was killed
    if not (recycle and take_spare(final.parent, folder)):
        folder.mkdir(parents=True)
    return folder


def end_directory(folder: Path, final: Path) -> Path:
    """Make a directory with all that belongs to a checkpoint the newest one. Returns where it is."""
    if is_local(folder):
        _swap_in(folder, final)
        folder = final
    replace_text(folder.parent / LATEST, f"{folder.name}\n")
    return folder


def _swap_in(unfinished: Path, final: Path) -> None:
    """Put a finished directory in its place. `find` falls back on the one set aside, should we be killed between."""
    if final.exists():
        remove_tree(aside(final))
        final.rename(aside(final))
    unfinished.rename(final)
    flush_directory(final.parent)
