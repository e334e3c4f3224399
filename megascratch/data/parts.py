"""Parts: the finished pieces of a preprocessing run, kept until the dataset is whole, so that a run can be resumed.

    out.parts/plan.json                          what the parts were made from; parts of anything else are refused
              0000000_text.bin  .lengths         for each key: tokens end to end, and how many each document has
              0000000.json                       written last: counts, bad lines, and a checksum of each file
              0000001_text.bin  ...
              out_text_document.bin.<random>.tmp     the parts appended so far; a resumed run appends them again

A part counts as finished when its record stands and its files have the checksums recorded: so nothing needs to be
flushed to the disk before the end, and a part that a power cut damaged is made again.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path

import xxhash

from megascratch.data.atomic import temporary_name
from megascratch.data.corpus import Limits, is_compressed
from megascratch.data.indexed import bin_path
from megascratch.data.sources import PIECE_BYTES, Piece, pieces_of
from megascratch.errors import DataError, Problem

_READ_BYTES = 1 << 20
_LOCK, _PLAN = "lock", "plan.json"
_KINDS = "bin|lengths|idx|json"
_TEMPORARY = re.compile(rf".*\.({_KINDS})\.[0-9a-f]{{12}}\.tmp")
_OURS = re.compile(rf"lock|plan\.json|\d{{7}}(_.*)?\.({_KINDS})|{_TEMPORARY.pattern}")


@dataclass(frozen=True)
class Part:
    """What one worker turns into tokens at a time.

    Attributes:
        number: from 0, in the order of the corpus.
        pieces: consecutive: one of a large file, or many small files.
    """

    number: int
    pieces: tuple[Piece, ...]

    @property
    def file_bytes(self) -> int:
        """How much of the corpus on disk this is."""
        return sum(piece.file_bytes for piece in self.pieces)

    def __str__(self) -> str:
        return f"part {self.number} ({', '.join(sorted({str(piece.file) for piece in self.pieces})[:3])})"


@dataclass(frozen=True)
class FileRecord:
    """What a piece of a file held: lines, those that were bad, and the first of these by number in the piece."""

    file: str
    n_lines: int
    n_bad_lines: int
    bad_lines: list[tuple[int, str]]


@dataclass(frozen=True)
class PartRecord:
    """What a finished part holds.

    Attributes:
        n_documents: for each key.
        n_tokens: of each key, in the keys' order.
        n_text_bytes: of text read.
        files: one entry a piece.
        checksums: of its files, in the order of `PartsDirectory.files` for each key.
    """

    n_documents: int
    n_tokens: list[int]
    n_text_bytes: int
    files: list[FileRecord]
    checksums: list[str]


def parts_of(files: Sequence[Path], keys: Sequence[str], limits: Limits) -> Iterator[Part]:
    """Cut a corpus into parts of about PIECE_BYTES; small files share one."""
    n_compressed = sum(map(is_compressed, files))
    number, pieces, size = 0, [], 0
    for file in files:
        for piece in pieces_of(file, keys, limits, n_compressed):
            pieces.append(piece)
            size += piece.file_bytes
            if size >= PIECE_BYTES:
                yield Part(number, tuple(pieces))
                number, pieces, size = number + 1, [], 0
    if pieces:
        yield Part(number, tuple(pieces))


@dataclass(frozen=True)
class PartsDirectory:
    """Where the parts of a run are kept."""

    path: Path
    keys: tuple[str, ...]

    def files(self, part: int, key: str) -> tuple[Path, Path]:
        """Return the files of a part: its tokens, and their number in each document, int64."""
        stem = self.path / f"{part:07d}_{key}"
        return bin_path(stem), Path(f"{stem}.lengths")

    def finish(self, part: int, record: PartRecord) -> None:
        """Declare a part finished."""
        path = self._record_path(part)
        temporary = temporary_name(path)
        temporary.write_text(json.dumps(asdict(record)))
        temporary.replace(path)

    def finished(self, part: int) -> PartRecord | None:
        """Return the record of a part; None when it isn't there, or its files are not what it says."""
        try:
            fields = json.loads(self._record_path(part).read_bytes())
            files = [FileRecord(**file) for file in fields.pop("files")]
            record = PartRecord(**fields, files=files)
            whole = [_checksum(file) for key in self.keys for file in self.files(part, key)] == record.checksums
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record if whole else None

    def _record_path(self, part: int) -> Path:
        return self.path / f"{part:07d}.json"


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def open_parts(
    path: Path, keys: Sequence[str], plan: Mapping[str, object], *, resume: bool, overwrite: bool
) -> Iterator[PartsDirectory]:
    """Make the directory of a run's parts, or take up that of an interrupted one; remove it when the body is done.

    Args:
        path: of the directory.
        keys: of the datasets.
        plan: all that the parts depend on, as JSON values.
        resume: keep finished parts of the same plan.
        overwrite: begin anew where there are parts.

    Raises: DataError: if there are parts already and neither is asked, if they are of another plan, or another run is
        at work on them.
    """
    path.mkdir(exist_ok=True)
    with (path / _LOCK).open("ab") as lock:
        _lock(lock, path)
        _require_ours(path)
        if resume:
            _require_same_plan(path, plan)
        elif not overwrite:
            _require_none_finished(path)
        for entry in os.scandir(path):
            if entry.name != _LOCK and (not resume or _TEMPORARY.fullmatch(entry.name)):
                os.unlink(entry)
        (path / _PLAN).write_text(json.dumps(plan, indent=2))
        try:
            yield PartsDirectory(path, tuple(keys))
        except BaseException:
            if _n_finished(path) == 0:
                shutil.rmtree(path)
            raise
        shutil.rmtree(path)


def _lock(lock: BufferedWriter, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = Problem(str(path), "another run is at work here", "wait for it, or choose another output prefix")
        raise DataError(problem, "the parts") from None
    except OSError:
        return  # a file system without locks


def _require_ours(path: Path) -> None:
    """Refuse a directory that holds anything but parts: it is going to be removed."""
    others = [entry.name for entry in os.scandir(path) if not _OURS.fullmatch(entry.name)]
    if others:
        problem = Problem(str(path), f"holds {others[0]!r}, which is not ours", "choose another output prefix")
        raise DataError(problem, "the parts")


def _n_finished(path: Path) -> int:
    return len(list(path.glob("[0-9]*.json")))


def _require_none_finished(path: Path) -> None:
    if n := _n_finished(path):
        rule = f"an interrupted run left {n:,} finished parts"
        raise DataError(
            Problem(str(path), rule, "add --resume to continue it, or --overwrite to begin anew"), "the parts"
        )


def _require_same_plan(path: Path, plan: Mapping[str, object]) -> None:
    if not _n_finished(path):
        return
    try:
        before = json.loads((path / _PLAN).read_bytes())
    except (OSError, ValueError):
        before = {}
    now = json.loads(json.dumps(plan))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        rule = f"was begun with other {', '.join(changed)}"
        remedy = "run with what it was begun with, or add --overwrite instead of --resume to begin anew"
        raise DataError(Problem(str(path), rule, remedy), "the parts")
