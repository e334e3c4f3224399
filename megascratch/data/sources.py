"""Pieces of a corpus: what one worker reads at a time, and how it turns into texts.

    corpus.jsonl, 20 MB     Stretch [0, 8 MB), [8, 16), [16, 20)   read by the worker that tokenizes it
    00.jsonl.gz to 99       WholeFile                              so is this: many files keep many workers busy
    page.txt                WholeFile                              and this
    few.jsonl.gz            Lines, Lines, ... of 8 MB              decompressed by whoever cuts, and handed over
    rows.parquet            RowGroups 0 to 3, 3 to 5, ...          read by the worker

The pieces depend on the files alone, so they are the same for every number of workers and on every machine.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from megascratch.data._jsonl import extract
from megascratch.data.batch import Batch, Texts
from megascratch.data.corpus import (
    Limits,
    StretchReader,
    at_most,
    format_of,
    is_compressed,
    opened,
    too_long,
    whole_lines,
)
from megascratch.data.parquet import row_groups
from megascratch.tokenizer.patterns import well_formed

PIECE_BYTES = 8 << 20  # a tenth of a second of work
_MANY_COMPRESSED_FILES = 16  # from here on each is read by one worker; fewer are decompressed for all workers


class Piece(Protocol):
    """A part of one file that one worker reads."""

    @property
    def file(self) -> Path:
        """The file."""
        ...

    @property
    def file_bytes(self) -> int:
        """How much of the file on disk this is."""
        ...

    def batches(self, keys: Sequence[str], limits: Limits) -> Iterator[Batch]:
        """Yield its texts.

        Raises: DataError: if a document is over the limit, or compressed data is damaged.
        """
        ...


@dataclass(frozen=True)
class Stretch:
    """The lines of a plain file that begin at bytes start to stop."""

    file: Path
    start: int
    stop: int

    @property
    def file_bytes(self) -> int:
        """How much of the file this is."""
        return self.stop - self.start

    def batches(self, keys: Sequence[str], limits: Limits) -> Iterator[Batch]:
        """Yield a batch a block."""
        with FileIO(self.file) as raw:
            for lines in whole_lines(StretchReader(raw, self.start, self.stop), self.file, limits):
                yield batch_of_lines(lines, keys)


@dataclass(frozen=True)
class Lines:
    """Whole lines of a compressed file, decompressed."""

    file: Path
    data: bytes
    file_bytes: int

    def batches(self, keys: Sequence[str], limits: Limits) -> Iterator[Batch]:
        """Yield a batch a block."""
        for lines in whole_lines(BytesIO(self.data), self.file, limits):
            yield batch_of_lines(lines, keys)


@dataclass(frozen=True)
class WholeFile:
    """A compressed file of lines, or a plain text, which is one document."""

    file: Path
    file_bytes: int

    def batches(self, keys: Sequence[str], limits: Limits) -> Iterator[Batch]:
        """Yield a batch a block, or the one document."""
        with opened(self.file, limits) as stream:
            if format_of(self.file) == "text":
                document = at_most(stream, limits.max_document_bytes + 1)
                if len(document) > limits.max_document_bytes:
                    raise too_long(self.file, "the text", limits)
                yield _batch_of_text(document)
                return
            for lines in whole_lines(stream, self.file, limits):
                yield batch_of_lines(lines, keys)


def pieces_of(file: Path, keys: Sequence[str], limits: Limits, n_compressed: int) -> Iterator[Piece]:
    """Cut a file into pieces, decompressing it here where it is one of few.

    Args:
        file: any input.
        keys: columns that a Parquet file must have.
        limits: for decompression.
        n_compressed: compressed files in the whole corpus.
    """
    size = file.stat().st_size
    if format_of(file) == "parquet":
        yield from row_groups(file, keys, PIECE_BYTES)
    elif format_of(file) == "text" or (is_compressed(file) and n_compressed >= _MANY_COMPRESSED_FILES):
        yield WholeFile(file, size)
    elif is_compressed(file):
        yield from _decompressed(file, limits)
    else:
        yield from (Stretch(file, start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES))


def _decompressed(file: Path, limits: Limits) -> Iterator[Lines]:
    position = 0
    with opened(file, limits) as stream:
        for lines in whole_lines(stream, file, limits, PIECE_BYTES):
            before, position = position, stream.on_disk
            yield Lines(file, bytes(lines), position - before)


def _batch_of_text(data: bytes) -> Batch:
    """Make one document of a plain text."""
    text = data.removeprefix(codecs.BOM_UTF8)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        nothing = Texts(np.empty(0, np.uint8), np.empty(0, np.int64))
        return Batch([nothing], 1, [(0, f"not UTF-8 at byte {error.start}")], len(data))
    return Batch([Texts(np.frombuffer(text, np.uint8), np.array([len(text)]))], 1, [], len(data))


def batch_of_lines(data: bytes | memoryview, keys: Sequence[str]) -> Batch:
    """Parse whole lines of JSON; blank ones are passed over."""
    bad_lines: list[tuple[int, str]] = []

    def unusual(number: int, line: bytes) -> list[bytes] | None:
        try:
            return [well_formed(value).encode() for value in parse_line(line, keys)]
        except ValueError as error:
            bad_lines.append((number, str(error)))
            return None

    by_key, n_lines = extract(data, list(keys), unusual)
    return Batch([Texts(*texts) for texts in by_key], n_lines, bad_lines, len(data))


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """Return the string of each key; raise ValueError, saying what is wrong, for anything else."""
    try:
        parsed = json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"not a JSON object: {type(parsed).__name__}")
    values = []
    for key in keys:
        if key not in parsed:
            raise ValueError(f'no key "{key}"')
        if not isinstance(parsed[key], str):
            raise ValueError(f'"{key}" is not a string: {type(parsed[key]).__name__}')
        values.append(parsed[key])
    return values
