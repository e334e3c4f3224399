"""Reading a corpus: which files, how they are decompressed, and whole lines of them in blocks of bounded size.

Nothing here holds more than a block and one line. A hostile file is refused with a message long before it fills the
memory or the disk: see `Limits`.

    file                      plain: any stretch can be read alone          compressed: only from the beginning
    ab⏎cde⏎fg⏎hijk⏎           [0, 4) → ab⏎ cde⏎   [4, 8) → fg⏎   ...       ab⏎ cde⏎  |  fg⏎ hijk⏎
                              a line belongs to the stretch it begins in    cut behind the last line of each block
"""

import glob
import gzip
import importlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from megascratch.data.checks import check_all
from megascratch.errors import DataError, MissingDependency, Problem

Format = Literal["jsonl", "text", "parquet"]

BLOCK_BYTES = 1 << 20  # text tokenized at a time
_SEARCHED_BYTES = 1 << 16  # looked through for the end of one line at a time
_LINE_FEED = ord("\n")
_COMPRESSED = (".gz", ".zst")
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # files written with `zstd --long=31`; memory is taken only as far as it is used
_ZSTD_STEP_BYTES = 1 << 10  # zstd expands up to 32,768-fold: at most 32 MB at a time
_EXPANSION_FREE_BYTES = 64 << 20  # a small file may expand to this much however far that is


@dataclass(frozen=True)
class Limits:
    """What is refused before it exhausts the machine.

    Attributes:
        max_document_bytes: one line of JSON (up to a block of 1 MiB always passes), one plain text file, one Parquet
            value. A worker takes a few times as much memory for the largest document that it meets.
        max_expansion: decompressed bytes for each byte on disk, above 64 MiB. Text shrinks 3- to 10-fold, and seldom
            beyond 50-fold.
    """

    max_document_bytes: int = 64 << 20
    max_expansion: int = 200


class Readable(Protocol):
    """A stream of decompressed bytes."""

    def read(self, n_bytes: int, /) -> bytes:
        """Return about `n_bytes`, b"" at the end."""
        ...


class Source(Protocol):
    """Bytes that are read into memory that is there already: new memory for each block costs more than reading it."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Write what comes next into the buffer's beginning; return how many bytes that is, 0 at the end."""
        ...


def format_of(file: Path) -> Format:
    """Return the format that a name tells: .txt is plain text, .parquet Parquet, anything else JSON Lines."""
    suffix = Path(file.stem).suffix if is_compressed(file) else file.suffix
    formats: dict[str, Format] = {".txt": "text", ".parquet": "parquet"}
    return formats.get(suffix, "jsonl")


def is_compressed(file: Path) -> bool:
    """Tell whether the name says that the bytes are compressed."""
    return file.suffix in _COMPRESSED


def input_files(inputs: Sequence[Path | str]) -> list[Path]:
    """Return the files that paths and patterns name, in the order given, those of one pattern sorted.

    Raises:
        DataError: if there are none, or any is missing or unreadable, or a pattern matches nothing.
        MissingDependency: if one needs an optional package that is not installed.
    """
    files: list[Path] = []
    for given in inputs:
        matches = sorted(glob.glob(str(given), recursive=True)) if not Path(given).exists() else []
        files += [Path(match) for match in matches] or [Path(given)]
    if not files:
        problem = Problem("no input file", "at least one is needed", "give .jsonl, .txt or .parquet, .gz and .zst too")
        raise DataError(problem, "the input")
    check_all([partial(_require_readable, file) for file in files], "the input")
    if any(file.suffix == ".zst" for file in files):
        _zstd_package()
    if any(format_of(file) == "parquet" for file in files):
        parquet_package()
    return files


def _require_readable(file: Path) -> None:
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise DataError(Problem(str(file), (error.strerror or str(error)).lower(), "check the path")) from None


@contextmanager
def opened(file: Path, limits: Limits) -> Iterator["Stream"]:
    """Open a file for reading from the beginning, decompressed."""
    with file.open("rb") as raw:
        yield Stream(file, raw, limits)


def at_most(stream: Readable, n_bytes: int) -> bytes:
    """Read a stream to its end, or until there are `n_bytes` or a little more."""
    buffer = bytearray()
    while len(buffer) < n_bytes and (data := stream.read(n_bytes - len(buffer))):
        buffer += data
    return bytes(buffer)


class StretchReader:
    """The lines of a plain file that begin at bytes `start` to `stop`."""

    def __init__(self, raw: FileIO, start: int, stop: int) -> None:
        self._raw, self._stop = raw, stop
        self._position = _first_line(raw, start, stop) if start else 0
        self._ended = True  # whether the last line read is whole
        raw.seek(self._position)

    def readinto(self, buffer: memoryview) -> int:
        """Read on, at last up to the end of the line that reaches over `stop`."""
        if self._position < self._stop:
            n_bytes = self._raw.readinto(buffer[: self._stop - self._position])
            self._position += n_bytes
            self._ended = n_bytes == 0 or buffer[n_bytes - 1] == _LINE_FEED
            return n_bytes
        if self._ended:
            return 0
        n_bytes = self._raw.readinto(buffer[:_SEARCHED_BYTES])
        cut = bytes(buffer[:n_bytes]).find(b"\n") + 1
        self._ended = cut > 0 or n_bytes == 0
        return cut or n_bytes


def _first_line(raw: FileIO, start: int, stop: int) -> int:
    """Return where the first line at or behind `start` begins; at least `stop` if none begins before."""
    position = start - 1
    raw.seek(position)
    while position < stop and (data := raw.read(_SEARCHED_BYTES)):
        cut = data.find(b"\n") + 1
        if cut:
            return position + cut
        position += len(data)
    return stop


def whole_lines(source: Source, file: Path, limits: Limits, block_bytes: int | None = None) -> Iterator[memoryview]:
    """Yield a source in blocks of whole lines. Exactly `block_bytes` (BLOCK_BYTES when left out) are read at a time, so
    the cuts are the same on every machine; what is behind the last line end joins the next block.

    A block is good until the next one is asked for: all lie in the same memory.

    Raises: DataError: if a line is longer than the limit.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    buffer = bytearray(2 * block_bytes)
    n_pending = n_before = 0  # bytes of a line that is not whole yet, at the buffer's beginning; and those before it
    while True:
        if n_pending + block_bytes > len(buffer):
            larger = bytearray(2 * len(buffer))
            larger[:n_pending] = buffer[:n_pending]
            buffer = larger
        view = memoryview(buffer)
        end = n_pending + _fill(source, view[n_pending : n_pending + block_bytes])
        if end == n_pending:
            break
        if cut := buffer.rfind(b"\n", n_pending, end) + 1:
            yield view[:cut]
            view[: end - cut] = buffer[cut:end]
        n_before, n_pending = n_before + cut, end - cut
        if n_pending > limits.max_document_bytes:
            raise too_long(file, f"a line {n_before:,} bytes behind the start of the part", limits)
    if n_pending:
        yield memoryview(buffer)[:n_pending]


def _fill(source: Source, buffer: memoryview) -> int:
    """Read until the buffer is full or the source ends; return how many bytes that is."""
    n_filled = 0
    while n_filled < len(buffer) and (n_bytes := source.readinto(buffer[n_filled:])):
        n_filled += n_bytes
    return n_filled


def too_long(file: Path, what: str, limits: Limits) -> DataError:
    """Return the error for a document over the limit."""
    rule = f"is longer than {limits.max_document_bytes:,} bytes"
    remedy = "is this the right format? Else raise --max-document-mb: memory grows by a few times as much a worker"
    return DataError(Problem(what, rule, remedy), str(file))


class Stream:
    """The bytes of a file, decompressed; damage and endless expansion become messages."""

    def __init__(self, file: Path, raw: BinaryIO, limits: Limits) -> None:
        self._file, self._raw, self._limits = file, raw, limits
        streams: dict[str, Callable[[BinaryIO], Readable]] = {".gz": _open_gzip, ".zst": _open_zstd}
        self._stream: Readable = streams[file.suffix](raw) if is_compressed(file) else raw
        self._n_read = 0
        self._rest = memoryview(b"")  # of what was read at once and found no room

    @property
    def on_disk(self) -> int:
        """How far reading has come in the file itself, in bytes."""
        return self._raw.tell()

    def read(self, n_bytes: int) -> bytes:
        """Return about `n_bytes`, b"" at the end.

        Raises: DataError: if compressed data is damaged or truncated, or expands beyond the limit.
        """
        try:
            data = self._stream.read(n_bytes)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise self._damaged(error) from error
        except Exception as error:  # ZstdError derives from Exception alone, and lives in an optional package
            if type(error).__name__ != "ZstdError":
                raise
            raise self._damaged(error) from error
        self._n_read += len(data)
        if self._n_read > max(_EXPANSION_FREE_BYTES, self._limits.max_expansion * self.on_disk):
            value = f"{self._n_read:,} bytes out of the first {self.on_disk:,}"
            rule = f"expands more than {self._limits.max_expansion}-fold"
            problem = Problem(
                value, rule, "a compression bomb? If the file is what it should be, raise --max-expansion"
            )
            raise DataError(problem, str(self._file))
        return data

    def readinto(self, buffer: memoryview) -> int:
        """Write what comes next into the buffer's beginning; return how many bytes that is, 0 at the end.

        Raises: as `read`.
        """
        data = self._rest or memoryview(self.read(len(buffer)))
        n_bytes = min(len(data), len(buffer))
        buffer[:n_bytes], self._rest = data[:n_bytes], data[n_bytes:]
        return n_bytes

    def _damaged(self, error: Exception) -> DataError:
        rule = f"cannot be {'decompressed' if is_compressed(self._file) else 'read'}: {error}"
        problem = Problem(self._file.name, rule, "the file is damaged or truncated: copy it again")
        return DataError(problem, str(self._file))


def parquet_package() -> Any:
    """Import pyarrow's Parquet module. Raises: MissingDependency: if it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        problem = Problem("pyarrow", "is needed to read .parquet files", "pip install 'megascratch[parquet]'")
        raise MissingDependency(problem, "the input") from None


def _open_gzip(raw: BinaryIO) -> Readable:
    return gzip.GzipFile(fileobj=raw)


def _zstd_package() -> str:
    for name in ("zstandard", "compression.zstd"):  # the second comes with Python 3.14
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return name
    raise MissingDependency(
        Problem("zstandard", "is needed to read .zst files", "pip install 'megascratch[zstd]'"), "the input"
    )


def _open_zstd(raw: BinaryIO) -> Readable:
    name = _zstd_package()
    zstd = importlib.import_module(name)
    if name == "zstandard":
        return _ZstdStream(raw, zstd.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES))
    options = {zstd.DecompressionParameter.window_log_max: _MAX_ZSTD_WINDOW_BYTES.bit_length() - 1}
    return cast(Readable, zstd.ZstdFile(raw, options=options))


class _ZstdStream:
    """Decompress frame after frame, and notice a frame that the file ends in: `zstandard`'s own reader does not."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._input = b""

    def read(self, n_bytes: int) -> bytes:
        """Return what the next steps give, at least a byte unless the file ends, b"" at its end."""
        output, size = [], 0
        while size < min(n_bytes, BLOCK_BYTES):
            self._input = self._input or self._raw.read(_ZSTD_STEP_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                break
            self._frame = self._frame or self._decompressor.decompressobj()
            output.append(self._frame.decompress(self._input))
            size += len(output[-1])
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(output)
