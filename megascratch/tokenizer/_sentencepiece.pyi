"""Types of the compiled extension; csrc/host/sentencepiece.cpp is its source."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class CharacterEncoder:
    """Encodes text by merges over characters."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: NDArray[np.int32],
        byte_ids: Sequence[int],
        frozen: Sequence[int],
        cut_spaces: bool,
    ) -> None: ...
    def encode(
        self, text: bytes, ends: NDArray[np.int64], document_ends: NDArray[np.int64], threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
