"""Parquet: the strings of chosen columns, a few row groups at a time. Needs pyarrow, the extra `parquet`.

A row group is what Parquet reads alone; rows are taken from it a few at a time, so that memory is bounded by the
documents and not by the group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megascratch.data.batch import Batch, Texts
from megascratch.data.corpus import Limits, parquet_package, too_long
from megascratch.errors import DataError, Problem

_ROWS = 128


@dataclass(frozen=True)
class RowGroups:
    """Row groups first to stop of a file; the keys are its columns."""

    file: Path
    first: int
    stop: int
    file_bytes: int

    def batches(self, keys: Sequence[str], limits: Limits) -> Iterator[Batch]:
        """Yield a batch for every few rows."""
        with _opened(self.file) as parquet:
            groups = list(range(self.first, self.stop))
            for rows in parquet.iter_batches(_ROWS, row_groups=groups, columns=list(keys)):
                yield _batch_of_rows(rows, keys, self.file, limits)


def row_groups(file: Path, keys: Sequence[str], piece_bytes: int) -> Iterator[RowGroups]:
    """Cut a file into pieces of about `piece_bytes` of the columns' compressed bytes.

    Raises: DataError: if a column is missing or holds no strings.
    """
    with _opened(file) as parquet:
        _require_strings(parquet.schema_arrow, keys, file)
        metadata = parquet.metadata
        columns = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path in keys]
        first = n_bytes = 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            n_bytes += sum(row_group.column(column).total_compressed_size for column in columns)
            if n_bytes >= piece_bytes or group + 1 == metadata.num_row_groups:
                yield RowGroups(file, first, group + 1, n_bytes)
                first, n_bytes = group + 1, 0


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    pyarrow = parquet_package()
    try:
        with pyarrow.ParquetFile(file) as parquet:
            yield parquet
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from ValueError
        reason = str(error).splitlines()[0]
        problem = Problem(file.name, f"cannot be read: {reason}", "the file is damaged or truncated: copy it again")
        raise DataError(problem, str(file)) from error


def _require_strings(schema: Any, keys: Sequence[str], file: Path) -> None:
    problems = []
    for key in keys:
        if key not in schema.names:
            problems.append(Problem(f"column {key!r}", "is not in the file", f"it has {', '.join(schema.names[:12])}"))
        elif str(kind := schema.field(key).type) not in ("string", "large_string"):
            problems.append(Problem(f"column {key!r}", f"holds {kind}", "name a column of strings"))
    if problems:
        raise DataError(problems, str(file))


def _batch_of_rows(rows: Any, keys: Sequence[str], file: Path, limits: Limits) -> Batch:
    columns = [rows.column(key) for key in keys]
    absent = np.zeros(rows.num_rows, bool)
    bad_lines = []
    for key, column in zip(keys, columns):
        column.validate(full=True)  # offsets and UTF-8
        nulls = column.is_null().to_numpy(zero_copy_only=False)
        bad_lines += [(int(row), f'"{key}" is null') for row in np.flatnonzero(nulls & ~absent)]
        absent |= nulls
    by_key = []
    for column in columns:
        strings = column.filter(~absent).cast("large_string") if absent.any() else column.cast("large_string")
        _, offsets, utf8 = strings.buffers()
        bounds = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
        if len(strings) and int(np.diff(bounds).max()) > limits.max_document_bytes:
            raise too_long(file, "a value", limits)
        begin, end = (int(bounds[0]), int(bounds[-1])) if len(strings) else (0, 0)
        by_key.append(Texts(np.frombuffer(utf8 or b"", np.uint8)[begin:end], bounds[1:] - begin))
    return Batch(by_key, rows.num_rows, sorted(bad_lines), sum(len(texts.utf8) for texts in by_key))
