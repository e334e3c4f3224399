"""Records of alignment data: JSON Lines or Parquet, each with the place that it came from.

chat.jsonl, line 3    {"messages": [{"role": "user", "content": "Hi"}, …]}
pairs.parquet, row 0  {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megascratch.data.corpus import Limits, format_of, input_files, opened, parquet_package, whole_lines
from megascratch.errors import DataError, Problem

_ROWS = 256


class Record(NamedTuple):
    """One object, or what is wrong with the line that should hold one, and where it stands."""

    where: str
    value: dict[str, Any] | Problem


def read_records(paths: Sequence[str], limits: Limits = Limits()) -> Iterator[Record]:
    """Yield the records of files and patterns, in the order given. Blank lines are passed over.

    Raises: DataError: if a file is missing, unreadable or damaged, or a line exceeds the limit.
    """
    for file in input_files(paths):
        match format_of(file):
            case "parquet":
                yield from _rows(file)
            case "text":
                rule = "is plain text, which has no turns"
                raise DataError(Problem(str(file), rule, "give .jsonl or .parquet"), "data.paths")
            case _:
                yield from _lines(file, limits)


def _lines(file: Path, limits: Limits) -> Iterator[Record]:
    number = 0
    with opened(file, limits) as stream:
        for block in whole_lines(stream, file, limits):
            for line in bytes(block).removesuffix(b"\n").split(b"\n"):
                number += 1
                if line.strip():
                    yield Record(f"{file}, line {number}", _parsed(line))


def _parsed(line: bytes) -> dict[str, Any] | Problem:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Problem("the line", f"is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Problem("the line", f"is not JSON: {error}")
    return value if isinstance(value, dict) else Problem("the line", f"is no JSON object: {type(value).__name__}")


def _rows(file: Path) -> Iterator[Record]:
    pyarrow = parquet_package()
    try:
        with pyarrow.ParquetFile(file) as parquet:
            number = 0
            for rows in parquet.iter_batches(_ROWS):
                for row in rows.to_pylist():
                    yield Record(f"{file}, row {number}", _without_nulls(row))
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from ValueError
        reason = str(error).splitlines()[0]
        problem = Problem(file.name, f"cannot be read: {reason}", "the file is damaged or truncated: copy it again")
        raise DataError(problem, str(file)) from error


def _without_nulls(value: Any) -> Any:
    """Leave out absent keys: a column of structs has every key in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
