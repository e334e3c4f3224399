"""Texts on their way to the tokenizer."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Texts(NamedTuple):
    """Strings in UTF-8 one after the other, [bytes], and the offset at which each ends, [strings] int64."""

    utf8: NDArray[np.uint8]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Texts that were read together.

    Attributes:
        by_key: the strings of each key; all have as many.
        n_lines: lines read (documents of plain text, rows of Parquet).
        bad_lines: number within the batch, from 0, and what is wrong.
        n_bytes: of text read, JSON included.
    """

    by_key: list[Texts]
    n_lines: int
    bad_lines: list[tuple[int, str]]
    n_bytes: int
