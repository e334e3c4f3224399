"""Splitting a dataset into train, valid and test, as Megatron reads `--split`.

    "969,30,1" of 5,000 sequences  →  train 0 to 4845, valid 4845 to 4995, test 4995 to 5000
    "99,1"                         →  no test

The parts are consecutive: nothing is shuffled across them, so a longer run keeps its validation documents.
"""

import re

import numpy as np

from megascratch.errors import DataError, Problem

SPLITS = ("train", "valid", "test")


def split_ranges(split: str, n_sequences: int) -> tuple[range | None, range | None, range | None]:
    """Return which sequences each of train, valid and test takes; None for a part of weight 0.

    Raises: DataError: if `split` is not one to three numbers with a positive sum.
    """
    parts = re.findall(r"[.0-9]+", split)
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= len(SPLITS) or sum(weights) <= 0 or "-" in split:
        rule = "must be one to three weights, of train, valid and test, that are not all 0"
        raise DataError(Problem(f"data.split = {split!r}", rule, 'for example "969,30,1"'))
    # Sums and products in Megatron's own order: another rounding would move a sequence to another part.
    total = np.sum(np.array(weights, np.float64))
    shares = [float(weight) for weight in np.array(weights, np.float64) / total]
    ranges: list[range | None] = []
    begin = 0.0
    for share in shares + [0.0] * (len(SPLITS) - len(shares)):
        end = begin + share
        empty = end <= begin
        ranges.append(None if empty else range(round(begin * n_sequences), round(end * n_sequences)))
        begin = end
    return ranges[0], ranges[1], ranges[2]
