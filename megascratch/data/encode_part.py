"""One part of a corpus, from bytes to finished files of tokens: what a worker does, here or on a cluster."""

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from megascratch.data._jsonl import pack
from megascratch.data.atomic import temporary_name
from megascratch.data.corpus import Limits
from megascratch.data.parts import FileRecord, Part, PartRecord, PartsDirectory
from megascratch.data.sources import Piece
from megascratch.tokenizer import Tokenizer

_KEPT_BAD_LINES = 20  # of a piece; the rest is only counted


def encode_part(
    tokenizer: Tokenizer, directory: PartsDirectory, eod_id: int | None, dtype: np.dtype, limits: Limits, part: Part
) -> PartRecord:
    """Write a part's files and its record. Doing it twice, or on two machines at once, gives the same files.

    Args:
        tokenizer: text that looks like a special token is text.
        directory: where the files go.
        eod_id: put behind each document that has tokens; None: nothing.
        dtype: of the tokens on disk.
        limits: what is refused.
        part: what to read.

    Raises: DataError: if a document is over the limit, or the input is damaged.
    """
    n_documents = n_text_bytes = 0
    n_tokens = [0] * len(directory.keys)
    files = []
    with ExitStack() as stack:
        outputs = [
            [stack.enter_context(_Output(path)) for path in directory.files(part.number, key)] for key in directory.keys
        ]
        for piece in part.pieces:
            lines = _Lines(piece)
            for batch in piece.batches(directory.keys, limits):
                lines.add(batch.n_lines, batch.bad_lines)
                n_text_bytes += batch.n_bytes
                n_documents += len(batch.by_key[0].ends)
                for key, (texts, (tokens_out, lengths_out)) in enumerate(zip(batch.by_key, outputs)):
                    tokens, lengths = pack(*tokenizer.encode_documents(*texts), eod_id, np.empty(0, dtype))
                    n_tokens[key] += len(tokens)
                    tokens_out.write(tokens)
                    lengths_out.write(lengths)
            files.append(lines.record())
    checksums = [output.checksum for of_key in outputs for output in of_key]
    record = PartRecord(n_documents, n_tokens, n_text_bytes, files, checksums)
    directory.finish(part.number, record)
    return record


class _Output:
    """A file that gets its name once it is whole, and the checksum of what was written, taken while that is near."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._file = self._temporary.open("xb")
        self._digest = xxhash.xxh3_128()

    @property
    def checksum(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()

    def write(self, values: NDArray) -> None:
        """Append an array's bytes."""
        self._digest.update(values.data)
        self._file.write(values.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink()


class _Lines:
    """Counts the lines of a piece, and keeps the first bad ones."""

    def __init__(self, piece: Piece) -> None:
        self.file = str(piece.file)
        self.n_lines = self.n_bad_lines = 0
        self.bad_lines: list[tuple[int, str]] = []

    def add(self, n_lines: int, bad_lines: list[tuple[int, str]]) -> None:
        self.n_bad_lines += len(bad_lines)
        room = _KEPT_BAD_LINES - len(self.bad_lines)
        self.bad_lines += [(self.n_lines + line, reason) for line, reason in bad_lines[:room]]
        self.n_lines += n_lines

    def record(self) -> FileRecord:
        return FileRecord(self.file, self.n_lines, self.n_bad_lines, self.bad_lines)
