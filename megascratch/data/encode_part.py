"""One part of a corpus, from bytes to finished datasets: what a worker does, here or on a cluster."""

from contextlib import ExitStack

import numpy as np

from megascratch.data._jsonl import pack
from megascratch.data.corpus import Limits
from megascratch.data.parts import FileRecord, Part, PartRecord, PartsDirectory
from megascratch.data.sources import Piece
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.tokenizer import Tokenizer

_KEPT_BAD_LINES = 20  # of a piece; the rest is only counted


def encode_part(
    part: Part, *, tokenizer: Tokenizer, directory: PartsDirectory, eod_id: int | None, dtype: np.dtype, limits: Limits
) -> PartRecord:
    """Write a part's datasets and its record. Doing it twice, or on two machines at once, gives the same files.

    Args:
        part: what to read.
        tokenizer: text that looks like a special token is text.
        directory: where the datasets go.
        eod_id: put behind each document that has tokens; None: nothing.
        dtype: of the tokens on disk.
        limits: what is refused.

    Raises: DataError: if a document is over the limit, or the input is damaged.
    """
    n_documents = n_text_bytes = 0
    n_tokens = [0] * len(directory.keys)
    files = []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                IndexedDatasetWriter(directory.prefix(part.number, key), dtype, overwrite=True, durable=False)
            )
            for key in directory.keys
        ]
        for piece in part.pieces:
            lines = _Lines(piece)
            for batch in piece.batches(directory.keys, limits):
                lines.add(batch.n_lines, batch.bad_lines)
                n_text_bytes += batch.n_bytes
                n_documents += len(batch.by_key[0].ends)
                for key, (writer, texts) in enumerate(zip(writers, batch.by_key)):
                    ids, ends = tokenizer.encode_documents(texts.utf8, texts.ends)
                    tokens, lengths = pack(ids, ends, eod_id, np.empty(0, dtype))
                    n_tokens[key] += len(tokens)
                    writer.add_documents(tokens, lengths)
            files.append(lines.record())
    checksums = [directory.checksum(part.number, key) for key in directory.keys]
    record = PartRecord(n_documents, n_tokens, n_text_bytes, files, checksums)
    directory.finish(part.number, record)
    return record


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
