"""csrc/host/jsonl.cpp: JSON Lines to texts, and ids to documents."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def extract(
    data: bytes | memoryview, keys: Sequence[str], unusual: Callable[[int, bytes], list[bytes] | None]
) -> tuple[list[tuple[NDArray[np.uint8], NDArray[np.int64]]], int]: ...
def pack(
    ids: NDArray[np.uint16] | NDArray[np.uint32], ends: NDArray[np.int64], eod: int | None, like: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.int64]]: ...
