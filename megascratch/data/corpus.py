"""Reading a corpus: JSON Lines, plain or compressed, in blocks of whole lines.

The reader only decompresses and cuts; decoding and parsing happen where the block is tokenized.
"""

import gzip
import importlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from megascratch.errors import DataError, MissingDependency, Problem

MAX_LINE_BYTES = 1 << 30  # one document; a longer line is a file that is not JSON Lines
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # files written with `zstd --long=31`
_ZSTD_STEP_BYTES = 16 << 10


class Readable(Protocol):
    """A stream of decompressed bytes."""

    def read(self, n_bytes: int, /) -> bytes:
        """Return about `n_bytes`, b"" at the end."""
        ...


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one file.

    Attributes:
        file: path of the file.
        first_line: number of the first line, counted from 1.
        data: the lines, decompressed.
        file_bytes: how far reading this block advanced in the file on disk.
    """

    file: Path
    first_line: int
    data: bytes
    file_bytes: int


def require_readable(files: list[Path]) -> None:
    """Check all input files before work starts.

    Raises:
        DataError: if there are none, or any is missing or unreadable.
        MissingDependency: if one is `.zst` and no zstd package is installed.
    """
    problems = []
    for file in files:
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            problems.append(Problem(str(file), (error.strerror or str(error)).lower(), "check the path"))
    if not files:
        problems.append(Problem("no input file", "at least one is needed", "give JSON Lines: .jsonl, .gz or .zst"))
    if problems:
        raise DataError(problems, "the input")
    if any(file.suffix == ".zst" for file in files):
        _zstd_package()


def read_blocks(file: Path, block_bytes: int) -> Iterator[Block]:
    """Yield a file in blocks of about `block_bytes` decompressed bytes that end where a line ends.

    Raises: DataError: if the compressed data is damaged or truncated, or a line is longer than MAX_LINE_BYTES.
    """
    line, position = 1, 0
    pending: list[bytes] = []  # the beginning of a line that reached over the end of what was read
    with file.open("rb") as raw:
        stream = _decompressed(file, raw)
        while data := _read(file, stream, block_bytes):
            cut = data.rfind(b"\n") + 1
            if cut == 0:
                pending.append(data)
                if sum(map(len, pending)) > MAX_LINE_BYTES:
                    rule = f"is longer than {MAX_LINE_BYTES:,} bytes"
                    raise DataError(Problem(f"line {line}", rule, "write one JSON object a line"), str(file))
                continue
            lines = b"".join([*pending, data[:cut]])
            pending = [data[cut:]] if cut < len(data) else []
            before, position = position, raw.tell()
            yield Block(file, line, lines, position - before)
            line += lines.count(b"\n")
        if pending:
            yield Block(file, line, b"".join(pending), raw.tell() - position)


def _read(file: Path, stream: Readable, n_bytes: int) -> bytes:
    try:
        return stream.read(n_bytes)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _damaged(file, error) from error
    except Exception as error:  # ZstdError derives from Exception alone, and lives in an optional package
        if type(error).__name__ != "ZstdError":
            raise
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DataError:
    rule = f"cannot be decompressed: {error}" if file.suffix in (".gz", ".zst") else f"cannot be read: {error}"
    return DataError(Problem(file.name, rule, "the file is damaged or truncated: copy it again"), str(file))


def _decompressed(file: Path, raw: BinaryIO) -> Readable:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.suffix == ".zst":
        return _open_zstd(raw)
    return raw


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
        """Return at least `n_bytes` unless the file ends before, b"" at its end."""
        output, size = [], 0
        while size < n_bytes:
            # Small steps: a hostile file expands 40,000-fold.
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
